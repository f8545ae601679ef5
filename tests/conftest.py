"""Small recordings, corpora and random models that the tests share; nothing here touches the network."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    COMET_ERROR_TRACKING_ENABLE="false",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
# Each of pytest-xdist's workers keeps to a core of its own: several processes that each use all cores spend most of their
# time waiting for one another.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})
for secret in ("HF_TOKEN", "COMET_API_KEY", "WANDB_API_KEY", "COMET_WORKSPACE", "COMET_PROJECT_NAME"):
    os.environ.pop(secret, None)

from transformers import (  # noqa: E402
    ASTFeatureExtractor,
    AutoConfig,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

# Every architecture of transformers with an audio-classification head.
ARCHITECTURES = [
    "audio-spectrogram-transformer", "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat",
    "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer", "wavlm", "whisper",
]  # fmt: skip

TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 4), "conv_stride": (5, 8, 4),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "conv_pos_kernel_size": 5, "classifier_proj_size": 8, "mask_time_length": 3, "apply_spec_augment": False,
}  # fmt: skip
SPECIAL = {
    "sew": {"squeeze_factor": 2},
    "sew-d": {"squeeze_factor": 2, "max_position_embeddings": 64, "position_buckets": 8},
    "unispeech-sat": {"xvector_output_dim": 8, "tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1)},
    "whisper": {
        "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_layers": 1,
        "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "num_mel_bins": 16, "max_source_positions": 100,
        "classifier_proj_size": 8, "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "audio-spectrogram-transformer": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "num_mel_bins": 16, "max_length": 128, "patch_size": 8, "frequency_stride": 8, "time_stride": 8,
    },
    "wav2vec2-bert": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 5, "classifier_proj_size": 8,
        "apply_spec_augment": False, "add_adapter": False, "mask_time_length": 3,
    },
}  # fmt: skip


def tiny_config(architecture, **changes):
    """Returns a configuration of this architecture with a few thousand parameters."""
    whole = ("whisper", "audio-spectrogram-transformer", "wav2vec2-bert")
    base = SPECIAL[architecture] if architecture in whole else TINY | SPECIAL.get(architecture, {})
    return AutoConfig.for_model(architecture, **base | changes)


def tiny_extractor(architecture):
    """Returns the feature extractor that fits `tiny_config`."""
    if architecture == "whisper":
        return WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    if architecture == "audio-spectrogram-transformer":
        return ASTFeatureExtractor(num_mel_bins=16, max_length=128)
    if architecture == "wav2vec2-bert":
        return SeamlessM4TFeatureExtractor()
    return Wav2Vec2FeatureExtractor(do_normalize=True)


def save_tiny(architecture, folder, **changes):
    """Saves the configuration and feature extractor, to train from scratch, and returns the folder's name."""
    tiny_config(architecture, **changes).save_pretrained(folder)
    tiny_extractor(architecture).save_pretrained(folder)
    return str(folder)


def tone(seconds, frequency, sampling_rate=16000, seed=0):
    """Returns a decaying tone in a little noise, float32."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate
    wave = 0.3 * np.sin(2 * np.pi * frequency * time) * np.exp(-time) + 0.01 * rng.standard_normal(len(time))
    return wave.astype(np.float32)


def write_tone(path, seconds=0.5, frequency=220, sampling_rate=16000, seed=0, **kwargs):
    """Writes a tone to a file and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, frequency, sampling_rate, seed), sampling_rate, **kwargs)
    return path


STYLES = ["amused", "angry", "disgusted", "drunk", "neutral", "sleepy", "surprised", "whisper"]


def make_thorsten(folder, num_sentences=5, seconds=0.4):
    """Lays out and names files as the real corpus does; each style is a tone of its own pitch."""
    sentences = [f"Das ist Satz Nummer {i}, schön und groß." for i in range(num_sentences)]
    stems = [hashlib.md5(sentence.encode()).hexdigest() for sentence in sentences]
    for style_index, style in enumerate(STYLES):
        for i, stem in enumerate(stems):
            write_tone(
                folder / style / f"{stem}.wav", seconds + 0.02 * i, 150 * 1.3**style_index, 22050, seed=8 * i + style_index
            )
    lines = [f"{stem}|{sentence}" for stem, sentence in zip(stems, sentences, strict=True)]
    (folder / "thorsten-emotional-metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Prepared features go to a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def thorsten(tmp_path_factory):
    """A small corpus that looks like Thorsten's."""
    return make_thorsten(tmp_path_factory.mktemp("thorsten") / "thorsten-emotional_v02")


@pytest.fixture(scope="session")
def tone_folder(tmp_path_factory):
    """CLASS/spkN_sM.wav: 2 classes told apart by pitch, 5 speakers, 3 sentences."""
    root = tmp_path_factory.mktemp("tones")
    for label, frequency in (("high", 880), ("low", 220)):
        for speaker in range(5):
            for sentence in range(3):
                path = root / label / f"spk{speaker}_s{sentence}.wav"
                write_tone(path, 0.3 + 0.05 * sentence, frequency * (1 + 0.02 * speaker), seed=speaker * 3 + sentence)
    return root


GROUPS = r"(?P<speaker_id>spk\d+)_(?P<sentence_id>s\d+)"
