"""Speech without downloads: espeak-ng's voices read sentences, and become log-free mel spectra."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import espeakng_loader
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

RATE = 16_000
SENTENCES = (
    "The birch canoe slid on the smooth planks.",
    "Glue the sheet to the dark blue background.",
    "It is easy to tell the depth of a well.",
    "These days a chicken leg is a rare dish.",
    "Rice is often served in round bowls.",
    "The juice of lemons makes fine punch.",
    "The box was thrown beside the parked truck.",
    "Four hours of steady work faced us.",
    "A large size in stockings is hard to sell.",
    "The boy was there when the sun rose.",
)
VOICES = tuple(
    f"{accent}+{who}" for accent in ("en-us", "en") for who in ("m1", "m3", "m7", "f2", "f4")
)


@cache
def _espeak() -> tuple[Any, int]:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = str(Path(espeakng_loader.get_data_path())).encode()
    rate = library.espeak_Initialize(2, 0, data, 0)  # synchronous
    if rate <= 0:
        raise RuntimeError(f"espeak-ng does not start: {rate}")
    return library, rate


def spoken(text: str, voice: str) -> Tensor:
    """(samples,) float32 at 16 kHz."""
    library, rate = _espeak()
    heard: list[int] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def hear(wave: Any, count: int, _: Any) -> int:
        if wave:
            heard.extend(wave[:count])
        return 0

    library.espeak_SetSynthCallback(hear)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise RuntimeError(f"espeak-ng has no voice {voice}")
    words = text.encode()
    library.espeak_Synth(words, len(words) + 1, 0, 0, 0, 1, None, None)
    wave = torch.tensor(heard, dtype=torch.float32) / 32768
    size = int(len(wave) * RATE / rate)
    return torch.nn.functional.interpolate(wave[None, None], size, mode="linear")[0, 0]


def mels(wave: Tensor, frames: int = 160) -> Tensor:
    """(windows, frames, 40): as Resemblyzer reads them, windows that overlap by half."""
    wave = wave * (10 ** (-30 / 20) / wave.square().mean().sqrt())
    spectrum = torch.stft(wave, 400, 160, window=torch.hann_window(400), return_complex=True)
    bank = mel_filter_bank(201, 40, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    found = spectrum.abs().square().T @ torch.from_numpy(bank).float()
    return found.unfold(0, frames, frames // 2).movedim(2, 1)
