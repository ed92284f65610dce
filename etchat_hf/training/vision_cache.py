"""Vision features on disk: the encoder is frozen, so that the same frames need to pass it only once."""

import hashlib
import os
import secrets
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..modeling_etchat import ETChatForConditionalGeneration

GIB = 1 << 30


class VisionCache:
    """
    Features by clip, in safetensors files named by what they follow from: the clip's normalised frames, hence the
    file's content and how it was sampled and resized, and the encoder's weights.

    Args:
        folder (`str`): made if it is missing; may be shared by processes and runs.
        max_gib (`float`): size at which nothing more is stored; nothing is ever removed.
        model ([`ETChatForConditionalGeneration`]): encodes what is not stored.

    Raises:
        ValueError: for a size that holds nothing.
    """

    def __init__(self, folder: str, max_gib: float, model: ETChatForConditionalGeneration):
        if not max_gib > 0:
            raise ValueError(f"vision_cache_gib is {max_gib}; it must be greater than 0.")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._room = max_gib * GIB - sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        self._model = model
        self._weights = _digest(model.model.vision_tower.parameters())

    def features(self, pixel_values: torch.FloatTensor, frame_times: list[list[float]]) -> torch.FloatTensor:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(N, 3, size, size)`): frames, clip after clip.
            frame_times (`list` of `list` of `float`): whose lengths say where each clip ends.

        Returns:
            `torch.FloatTensor` of shape `(N, patches, C)`.
        """
        clips = pixel_values.split([len(times) for times in frame_times])
        return torch.cat([self._clip_features(clip) for clip in clips])

    def _clip_features(self, clip: torch.FloatTensor) -> torch.FloatTensor:
        path = self.folder / f"{_digest([clip], self._weights)}.safetensors"
        if path.is_file():
            return load_file(path)["features"].to(clip.device)
        features = self._model.get_vision_features(clip)
        size = features.numel() * features.element_size()
        if size <= self._room:
            self._room -= size
            aside = path.with_suffix(f".{secrets.token_hex(4)}")
            save_file({"features": features.contiguous().cpu()}, aside)
            os.replace(aside, path)
        return features


def _digest(tensors, *salts: str) -> str:
    state = hashlib.blake2b("".join(salts).encode(), digest_size=16)
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
