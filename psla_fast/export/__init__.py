"""Export: a checkpoint -> safetensors, the Hugging Face Hub's layout, ONNX, torch.export, int8 ONNX."""

from typing import TYPE_CHECKING, Any

from psla_fast.export.engine import Exported, Format, export_checkpoint

if TYPE_CHECKING:
    from psla_fast.export.hub import HubTagger

__all__ = ["Exported", "Format", "HubTagger", "export_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import HubTagger where it is asked for: huggingface_hub is an extra."""
    if name != "HubTagger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from psla_fast.export.hub import HubTagger
    except ImportError as error:
        raise ValueError("HubTagger needs the extra export: pip install 'psla-fast[export]'.") from error
    return HubTagger
