"""The CPU's dropout drops and scales as torch's does, from torch's own generator."""

import json

import pytest
import torch
from conftest import ARCHITECTURES, tiny_config
from torch import nn
from transformers import AutoModelForAudioClassification, set_seed

from speech_emotion.dropout import ATTENTION_NAME, CpuDropout, attend, drop, use_cpu_dropout


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_dropped_with_the_probability_asked_for_and_scaled(p, dtype):
    set_seed(0)
    kept = drop(torch.ones(1001, 999, dtype=dtype), p)
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()], rel=2e-4)
    share = (kept == 0).float().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)  # five standard deviations
    # A value's place does not change its chances.
    assert (kept == 0).float().mean(dim=0).std() < 2 * (p * (1 - p) / 1001) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_neighbours_which_share_a_random_number_fall_independently_of_each_other(p):
    set_seed(0)
    num_masks, num_values, num_neighbours = 20, 1_000_000, 16
    dropped = torch.stack([drop(torch.ones(num_values), p) == 0 for _ in range(num_masks)]).view(-1, num_neighbours).float()
    correlations = torch.corrcoef(dropped.T).sub(torch.eye(num_neighbours))
    assert correlations.abs().max() < 5 * (num_neighbours / (num_masks * num_values)) ** 0.5  # five standard deviations


def test_the_gradient_passes_where_the_value_did():
    values = torch.randn(7, 13, requires_grad=True)
    dropped = drop(values, 0.3)
    dropped.sum().backward()
    expected = torch.where(dropped == 0, 0.0, 1 / (1 - 0.3))
    torch.testing.assert_close(values.grad, expected)
    torch.testing.assert_close(dropped, values * expected)


def test_the_same_seed_drops_the_same_and_evaluation_drops_nothing():
    layer, values = CpuDropout(0.4), torch.randn(50, 50)
    set_seed(3)
    first = layer(values)
    assert not torch.equal(first, layer(values))
    set_seed(3)
    assert torch.equal(first, layer(values))
    assert torch.equal(layer.eval()(values), values)


def test_attention_without_dropout_is_sdpa_and_with_it_is_right_on_average():
    set_seed(0)
    query, key, value = torch.randn(3, 2, 4, 30, 8)
    mask = torch.ones(2, 1, 30, 30, dtype=torch.bool)
    mask[1, ..., 20:] = False
    module = nn.Module()
    plain, _ = attend(module, query, key, value, mask)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(plain, expected)
    mean = torch.stack([attend(module, query, key, value, mask, dropout=0.2)[0] for _ in range(4000)]).mean(dim=0)
    torch.testing.assert_close(mean, expected, atol=0.06, rtol=0)
    changed = value.clone()
    changed[1, :, 20:] = 99.0
    set_seed(1)
    first = attend(module, query, key, value, mask, dropout=0.2)[0]
    set_seed(1)
    torch.testing.assert_close(attend(module, query, key, changed, mask, dropout=0.2)[0], first)  # masked frames are not seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_evaluate_the_same_train_and_are_saved_as_ordinary_ones(architecture, tmp_path):
    set_seed(0)
    model = AutoModelForAudioClassification.from_config(tiny_config(architecture)).eval()
    shape = {"whisper": (2, 16, 200), "audio-spectrogram-transformer": (2, 128, 16), "wav2vec2-bert": (2, 50, 160)}
    inputs = {model.main_input_name: torch.randn(shape.get(architecture, (2, 8000)))}
    with torch.no_grad():
        before = model(**inputs).logits
        names = set(model.state_dict())
        use_cpu_dropout(model)
        torch.testing.assert_close(model(**inputs).logits, before)
    assert set(model.state_dict()) == names
    assert not any(type(module) is nn.Dropout for module in model.modules())
    model.train()(**inputs).logits.sum().backward()
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    assert ATTENTION_NAME not in (tmp_path / "saved" / "config.json").read_text()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == architecture
    again = AutoModelForAudioClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
