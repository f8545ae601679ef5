"""Loss, optimizers and schedules do what their names say."""

import numpy as np
import pytest
import torch
from conftest import tiny_config
from safetensors.numpy import load_file
from transformers import AutoModelForAudioClassification

from speech_emotion.arguments import SpeechTrainingArguments
from speech_emotion.errors import UserError
from speech_emotion.optimization import build_loss, build_optimizer, build_scheduler


@pytest.fixture(scope="module")
def model():
    return AutoModelForAudioClassification.from_config(tiny_config("wav2vec2"))


def training(tmp_path, **kwargs):
    return SpeechTrainingArguments(output_dir=str(tmp_path), **kwargs)


def test_accumulated_batches_add_up_to_the_loss_of_the_whole(tmp_path):
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    for kwargs in (
        {"label_smoothing_factor": 0.1},
        {"label_smoothing_factor": 0.1, "class_weights": "balanced"},
        {"loss": "focal"},
    ):
        loss = build_loss(labels.numpy(), 3, training(tmp_path, **kwargs))
        whole = loss({"logits": logits}, labels)
        parts = [loss({"logits": logits[i : i + 2]}, labels[i : i + 2], num_items_in_batch=8) for i in range(0, 8, 2)]
        torch.testing.assert_close(sum(parts), whole)


def test_balanced_weights_make_classes_count_the_same(tmp_path):
    labels = np.array([0] * 9 + [1])
    loss = build_loss(labels, 2, training(tmp_path, class_weights="balanced"))
    logits = torch.zeros(10, 2, requires_grad=True)
    loss({"logits": logits}, torch.from_numpy(labels)).backward()
    assert logits.grad[:9, 0].sum().item() == pytest.approx(logits.grad[9, 1].item())


def test_focal_loss_is_that_of_its_paper_and_with_gamma_0_the_cross_entropy(tmp_path):
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]), torch.tensor([0, 0, 1])
    right = torch.softmax(logits, dim=1)[torch.arange(3), labels]
    expected = (-((1 - right) ** 2) * right.log()).mean()  # FL(p) = -(1 - p)^gamma log(p), arXiv 1708.02002, equation 4
    loss = build_loss(labels.numpy(), 2, training(tmp_path, loss="focal", focal_gamma=2.0))
    torch.testing.assert_close(loss({"logits": logits}, labels), expected)
    plain = build_loss(labels.numpy(), 2, training(tmp_path, loss="focal", focal_gamma=0.0))
    torch.testing.assert_close(plain({"logits": logits}, labels), torch.nn.functional.cross_entropy(logits, labels))


def test_label_smoothing_is_torchs(tmp_path):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(
        build_loss(labels.numpy(), 3, training(tmp_path, label_smoothing_factor=0.2))({"logits": logits}, labels), expected
    )


@pytest.mark.parametrize(
    ("optim", "kind"),
    [("adamw_torch", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD),
     ("rmsprop", torch.optim.RMSprop), ("adamw_torch_fused", torch.optim.AdamW)],
)  # fmt: skip
def test_optimizers_have_two_rates_and_spare_norms_and_biases(optim, kind, model, tmp_path):
    arguments = training(tmp_path, optim=optim, learning_rate=1e-4, head_learning_rate=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(model, arguments)
    assert type(optimizer) is kind
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            assert group["lr"] == (1e-2 if name.startswith(("projector", "classifier")) else 1e-4), name
            assert group["weight_decay"] == (0.0 if "bias" in name or "norm" in name else 0.1), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_optimizer_arguments_are_passed_and_checked(model, tmp_path):
    optimizer = build_optimizer(model, training(tmp_path, optim="sgd", optim_args="momentum=0.9"))
    assert optimizer.param_groups[0]["momentum"] == 0.9
    with pytest.raises(UserError, match="key 'optim_args': 'momentun=0.9' does not fit sgd"):
        build_optimizer(model, training(tmp_path, optim="sgd", optim_args="momentun=0.9"))


def rates(model, arguments, num_steps):
    optimizer = build_optimizer(model, arguments)
    scheduler = build_scheduler(optimizer, arguments, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_count_in_epochs(model, tmp_path):
    def schedule(name, **kwargs):
        arguments = training(tmp_path, learning_rate=1.0, num_train_epochs=4, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs)
        return rates(model, arguments, 12)

    assert schedule("step", step_size=2, gamma=0.1) == pytest.approx([1.0] * 6 + [0.1] * 6)
    assert schedule("multi_step", milestones=[1, 3], gamma=0.5) == pytest.approx([1.0] * 3 + [0.5] * 6 + [0.25] * 3)
    assert schedule("exponential", gamma=0.5) == pytest.approx([1.0] * 3 + [0.5] * 3 + [0.25] * 3 + [0.125] * 3)
    one_cycle = schedule("one_cycle")
    assert max(one_cycle) == pytest.approx(1.0, abs=0.02) and one_cycle[0] < 0.1 and one_cycle[-1] < 0.1
    with pytest.raises(UserError, match="key 'lr_scheduler_kwargs'.*does not fit step"):
        schedule("step", gama=0.1)


def test_warm_up_takes_a_share_of_the_steps(model, tmp_path):
    arguments = training(tmp_path, learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=0.25)
    found = rates(model, arguments, 12)
    assert found[0] == 0 and found[3] == max(found) == 1.0 and found[-1] == pytest.approx(1 / 9)


def test_the_head_is_trained_alone_first(tone_folder, tmp_path):
    from test_runs import flags

    import run_classification

    common = {"learning_rate": 1e-2, "seed": 1}
    run_classification.main(flags(tmp_path, tone_folder, output_dir=tmp_path / "a", num_train_epochs=2, save_total_limit=9,
                                  head_only_epochs=1, **common))  # fmt: skip
    first, last = (load_file(tmp_path / "a" / f"checkpoint-{step}" / "model.safetensors") for step in (5, 10))
    run_classification.main(flags(tmp_path, tone_folder, output_dir=tmp_path / "b", max_steps=1, head_only_epochs=9, **common))
    start = load_file(tmp_path / "b" / "model.safetensors")
    for name in start:
        is_head = name.startswith("classifier.")
        assert np.array_equal(first[name], start[name]) != is_head, name  # only the head had moved after an epoch
    assert any(not np.array_equal(first[name], last[name]) for name in start if not name.startswith("classifier."))
