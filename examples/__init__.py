"""Examples of what a user adds to psla_fast."""
