"""What a conversion did, key by key."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConversionReport:
    """
    What became of every key.

    Args:
        layout (`str`): what was read: `"full"`, `"LoRA"`, `"pieces"` or `"converted"`.
        destination (`str`): folder that was written.
        used (`tuple[str, ...]`): source keys that went into the result.
        left_out (`dict[str, str]`): source keys that did not, each with its reason.
        filled (`tuple[str, ...]`): target keys made of source keys.
        fresh (`dict[str, str]`): target keys that no source key fills, each with its origin: freshly initialised, or a
            constant.
        dtypes (`dict[str, int]`): dtype -> number of tensors written.
        files (`tuple[str, ...]`): weight files written.
        notes (`list[str]`): what else the reader should know.
    """

    layout: str
    destination: str
    used: tuple[str, ...]
    left_out: dict[str, str]
    filled: tuple[str, ...]
    fresh: dict[str, str]
    dtypes: dict[str, int]
    files: tuple[str, ...]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        lines = [
            f"{self.layout} checkpoint -> {self.destination}",
            f"  source keys: {len(self.used)} used, {len(self.left_out)} left out",
            *_by_reason(self.left_out),
            f"  target keys: {len(self.filled)} filled, {len(self.fresh)} fresh",
            *_by_reason(self.fresh),
            f"  tensors: {dtypes}",
            f"  weights: {', '.join(self.files)}",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _by_reason(reasons: dict[str, str]) -> list[str]:
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        keys = [key for key in reasons if reasons[key] == reason]
        lines += [f"    {reason}:", *(f"      {key}" for key in keys)]
    return lines
