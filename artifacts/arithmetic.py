"""What an engine computes in."""

from enum import StrEnum

_ATTENTION = {"own-attention": "own attention kernel", "int8-attention": "own attention kernel in int8"}


class Arithmetic(StrEnum):
    """The floating-point type that an engine computes in, and how."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    F32_OWN_ATTENTION = "f32-own-attention"
    BF16_OWN_ATTENTION = "bf16-own-attention"
    F32_INT8_ATTENTION = "f32-int8-attention"
    BF16_INT8_ATTENTION = "bf16-int8-attention"  # in manifests of earlier versions

    @property
    def description(self) -> str:
        """The text for users."""
        floats, _, attention = self.value.partition("-")
        return f"{floats} ({_ATTENTION[attention]})" if attention else floats

    @classmethod
    def _missing_(cls, value: object) -> "Arithmetic | None":
        """Early manifests hold the description."""
        return next((member for member in cls if member.description == value), None)
