"""Commands that need more than a screen of flags: each module is one, or a few of one kind."""
