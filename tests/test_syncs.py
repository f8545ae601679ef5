"""Between two log entries, training asks the device for no number: each question would make a GPU wait."""

import pytest
import torch
from test_runs import flags
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import run_classification

# What reads a tensor's value into Python, or sizes a result by it.
QUESTIONS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select", "aten.equal")


class Listener(TorchDispatchMode):
    """Collects the questions that are asked while it listens."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).rpartition(".")[0] in QUESTIONS:
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("audio-spectrogram-transformer", {"class_weights": "balanced"}),
        ("whisper", {"label_smoothing_factor": 0.1}),
        # Layer drop draws its numbers on the CPU in any case.
        ("wav2vec2", {"config_overrides": "layerdrop=0.0"}),
        ("wav2vec2", {"freeze": "backbone"}),
        # With an attention mask, for padding, before and behind frozen convolutions.
        ("wav2vec2", {"config_overrides": "layerdrop=0.0,feat_extract_norm=layer,do_stable_layer_norm=true"}),
        ("wav2vec2", {"config_overrides": "layerdrop=0.0", "freeze": "feature_encoder"}),
        ("hubert", {"config_overrides": "layerdrop=0.0", "freeze": "feature_encoder"}),
    ],
    ids=str,
)
def test_a_training_step_asks_nothing(architecture, settings, tone_folder, tmp_path, monkeypatch):
    listener = Listener()

    class Listen(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            listener.__enter__()

        def on_step_end(self, *args, **kwargs):
            listener.__exit__(None, None, None)

    monkeypatch.setattr(run_classification, "ProgressSentences", Listen)
    run_classification.main(flags(tmp_path, tone_folder, architecture, num_train_epochs=1, logging_steps=1000, **settings))
    assert listener.asked == []
    with listener:
        torch.ones(()).item()
    assert listener.asked == ["aten._local_scalar_dense.default"]  # it would have heard
