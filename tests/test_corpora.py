"""Every source of recordings becomes the common table, and says what is wrong with it."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile

import pandas as pd
import pytest
from conftest import GROUPS, ROOT, STYLES, make_thorsten, tiny_config, tiny_extractor, write_tone
from datasets import Audio, ClassLabel, Dataset
from loopback import file_handler, hub_handler, serve
from transformers import AutoModel

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora import audio_folder, manifest, polish, thorsten
from speech_emotion.corpora.table import keep_labels
from speech_emotion.errors import UserError

COMMON = {"audio", "label", "speaker_id", "sentence_id", "session_id", "duration"}


def assert_common(table):
    assert set(table.column_names) >= COMMON
    assert table.features["audio"] == Audio(decode=False) and isinstance(table.features["label"], ClassLabel)
    assert 0 < min(table["duration"]) < 60


def test_the_demo_is_whole_and_balanced():
    table = polish.load(DataArguments())
    assert_common(table)
    frame = table.remove_columns("audio").to_pandas()
    assert table.features["label"].names == ["anger", "fear", "neutral"]
    assert len(frame) == 450 and frame.groupby(["label", "speaker_id", "sentence_id"]).size().eq(5).all()
    assert frame["duration"].sum() == pytest.approx(378, abs=1)


def test_the_demo_says_when_recordings_are_missing(tmp_path):
    with pytest.raises(UserError, match="holds 0 of the demo's 450"):
        polish.load(DataArguments(data_dir=str(tmp_path)))


def test_thorsten_knows_its_sentences_and_the_clip_never_published(tmp_path):
    root = make_thorsten(tmp_path / "thorsten-emotional_v02", num_sentences=4)
    stem = "2cc2cc4a34b961ef1657cc82dbd18875"
    for style in STYLES[:-1]:
        write_tone(root / style / f"{stem}.wav", sampling_rate=22050)
    with open(root / thorsten.METADATA_FILE, "a", encoding="utf-8") as file:
        file.write(f"{stem}|Ein Satz, der nie geflüstert wurde.\n")
    for data_dir in (root, tmp_path):
        table = thorsten.load(DataArguments(data_dir=str(data_dir)))
        assert_common(table)
        assert len(table) == 8 * 5 - 1 and table.features["label"].names == STYLES
    row = table[0]
    assert hashlib.md5(row["sentence"].encode()).hexdigest() == row["sentence_id"] or row["sentence_id"] == stem
    assert set(table["speaker_id"]) == {"thorsten"}
    five = thorsten.load(DataArguments(data_dir=str(root), dataset_config_name="emotions"))
    assert five.features["label"].names == ["amused", "angry", "disgusted", "neutral", "surprised"] and len(five) == 25


def test_thorsten_lists_whatever_else_is_missing(tmp_path):
    root = make_thorsten(tmp_path / "t", num_sentences=3)
    gone = sorted((root / "angry").glob("*.wav"))[0]
    gone.unlink()
    with pytest.raises(UserError, match=f"1 clips of the corpus are not there:\n  - angry/{gone.name}"):
        thorsten.load(DataArguments(data_dir=str(root)))
    assert len(thorsten.load(DataArguments(data_dir=str(root), on_bad_audio="skip"))) == 23
    with pytest.raises(UserError, match="is not the Thorsten emotional corpus"):
        thorsten.load(DataArguments(data_dir=str(tmp_path / "t" / "angry")))
    with pytest.raises(UserError, match="no 'emotion', but styles and emotions"):
        thorsten.load(DataArguments(data_dir=str(root), dataset_config_name="emotion"))


def make_archive(tmp_path):
    root = make_thorsten(tmp_path / "thorsten-emotional_v02", num_sentences=3)
    archive = tmp_path / "t.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, arcname=root.name)
    return archive, archive.read_bytes()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """An archive whose size and md5 are those that the loader expects."""
    archive, content = make_archive(tmp_path / "made")
    monkeypatch.setattr(thorsten, "ARCHIVE_NUM_BYTES", len(content))
    monkeypatch.setattr(thorsten, "ARCHIVE_MD5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(thorsten, "_RETRY_SECONDS", 0.0)
    return archive, content


def test_a_broken_download_goes_on_where_it_broke_off(published, tmp_path):
    _, content = published
    handler = file_handler(content, break_after=[1000, 2000])
    with serve(handler) as address:
        data = DataArguments(download_url=f"{address}/t.tgz")
        assert len(thorsten.load(data, str(tmp_path / "cache"))) == 24
        assert handler.requests == [None, "bytes=1000-", "bytes=3000-"]
        assert len(thorsten.load(data, str(tmp_path / "cache"))) == 24
    assert len(handler.requests) == 3  # the second load downloads nothing


def test_a_server_without_ranges_starts_over(published, tmp_path):
    _, content = published
    handler = file_handler(content, break_after=[1000], ranges=False)
    with serve(handler) as address:
        thorsten.download(f"{address}/t.tgz", tmp_path / "t.tgz", len(content), hashlib.md5(content).hexdigest())
    assert (tmp_path / "t.tgz").read_bytes() == content


def test_a_download_that_keeps_breaking_off_keeps_what_came(published, tmp_path):
    _, content = published
    with serve(file_handler(content, break_after=[100] * 9)) as address:
        with pytest.raises(UserError, match=r"500 of [\d,]+ bytes are kept: run again to go on"):
            thorsten.load(DataArguments(download_url=f"{address}/t.tgz"), str(tmp_path))
    with serve(file_handler(content)) as address:
        assert len(thorsten.load(DataArguments(download_url=f"{address}/t.tgz"), str(tmp_path))) == 24


def test_another_file_than_the_published_one_is_refused(published, tmp_path):
    archive, content = published
    with serve(file_handler(bytes(len(content)))) as address:
        with pytest.raises(UserError, match="has md5 .*, the published archive"):
            thorsten.load(DataArguments(download_url=f"{address}/t.tgz"), str(tmp_path))
    with serve(file_handler(content, status=404)) as address, pytest.raises(UserError, match="the server answers 404"):
        thorsten.load(DataArguments(download_url=f"{address}/t.tgz"), str(tmp_path))
    archive.write_bytes(content[:-10])
    with pytest.raises(UserError, match="bytes, the published archive"):
        thorsten.load(DataArguments(data_dir=str(archive)), str(tmp_path))


def test_data_dir_may_be_the_archive(published, tmp_path):
    assert len(thorsten.load(DataArguments(data_dir=str(published[0])), str(tmp_path))) == 24


@pytest.mark.parametrize(
    "name, kind",
    [("/etc/evil", tarfile.REGTYPE), ("thorsten-emotional_v02/../../evil", tarfile.REGTYPE),
     ("thorsten-emotional_v02/link", tarfile.SYMTYPE), ("thorsten-emotional_v02/hard", tarfile.LNKTYPE),
     ("thorsten-emotional_v02/fifo", tarfile.FIFOTYPE)],
)  # fmt: skip
def test_an_archive_that_leads_outside_is_not_extracted(name, kind, tmp_path):
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member, io.BytesIO(b""))
    with pytest.raises(UserError, match="links or lead outside"):
        thorsten.extract(tmp_path / "evil.tgz", tmp_path / "out" / "thorsten-emotional_v02")
    assert not list(tmp_path.rglob("evil")) and not (tmp_path / "out" / "thorsten-emotional_v02").exists()


def test_a_folder_of_classes(tone_folder):
    table = audio_folder.load(DataArguments(data_dir=str(tone_folder), group_pattern=GROUPS))
    assert_common(table)
    assert table.features["label"].names == ["high", "low"] and len(table) == 30
    assert set(table["speaker_id"]) == {f"spk{i}" for i in range(5)} and set(table["sentence_id"]) == {"s0", "s1", "s2"}
    plain = audio_folder.load(DataArguments(data_dir=str(tone_folder)))
    assert set(plain["speaker_id"]) == {None}


def test_a_folder_with_splits(tmp_path):
    for split in ("train", "valid", "test"):
        for label in ("böse", "fröhlich"):
            write_tone(tmp_path / split / label / "ä.wav")
    corpus = audio_folder.load(DataArguments(data_dir=str(tmp_path)))
    assert {name: len(part) for name, part in corpus.items()} == {"train": 2, "validation": 2, "test": 2}
    assert corpus["train"].features["label"].names == ["böse", "fröhlich"]


def test_a_folder_says_what_is_wrong(tone_folder, tmp_path):
    with pytest.raises(UserError, match="key 'data_dir' is missing"):
        audio_folder.load(DataArguments())
    with pytest.raises(UserError, match="is not a folder"):
        audio_folder.load(DataArguments(data_dir=str(tmp_path / "none")))
    with pytest.raises(UserError, match="no recordings found"):
        audio_folder.load(DataArguments(data_dir=str(tmp_path)))
    with pytest.raises(UserError, match="does not match 30 of 30 paths"):
        audio_folder.load(DataArguments(data_dir=str(tone_folder), group_pattern=r"(?P<speaker_id>nobody\d)"))
    with pytest.raises(UserError, match="is not a regular expression"):
        audio_folder.load(DataArguments(data_dir=str(tone_folder), group_pattern="(?P<speaker_id>"))
    write_tone(tmp_path / "only" / "a.wav")
    with pytest.raises(UserError, match="at least two classes; found \\['only'\\]"):
        audio_folder.load(DataArguments(data_dir=str(tmp_path)))
    write_tone(tmp_path / "stray.wav")
    with pytest.raises(UserError, match="lie in no class folder.*\n  - stray.wav"):
        audio_folder.load(DataArguments(data_dir=str(tmp_path)))


def manifest_rows(folder):
    rows = []
    for i in range(6):
        write_tone(folder / "clips" / f"{i}.wav", seed=i)
        rows.append({"path": f"clips/{i}.wav", "label": ["sad", "glad"][i % 2], "speaker_id": f"00{i % 3}",
                     "split": ["train", "dev", "test"][i % 3]})  # fmt: skip
    return rows


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_a_manifest_of_any_form(suffix, tmp_path):
    rows = manifest_rows(tmp_path)
    path = tmp_path / f"m.{suffix}"
    if suffix in ("csv", "tsv"):
        pd.DataFrame(rows).to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    corpus = manifest.load(DataArguments(data_files=[str(path)]))
    assert {name: len(part) for name, part in corpus.items()} == {"train": 2, "validation": 2, "test": 2}
    assert_common(corpus["train"])
    assert set(corpus["train"]["speaker_id"]) == {"000"} and corpus["train"].features["label"].names == ["glad", "sad"]


def test_manifests_may_be_the_splits(tmp_path):
    frame = pd.DataFrame(manifest_rows(tmp_path)).drop(columns="split")
    files = []
    for name in ("train", "test"):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        files.append(f"{name}={tmp_path / name}.csv")
    assert set(manifest.load(DataArguments(data_files=files))) == {"train", "test"}


def test_a_manifest_says_what_is_wrong(tmp_path):
    frame = pd.DataFrame(manifest_rows(tmp_path))
    path = tmp_path / "m.csv"

    def load(table, **kwargs):
        table.to_csv(path, index=False)
        return manifest.load(DataArguments(data_files=[str(path)], **kwargs))

    with pytest.raises(UserError, match="m.csv: there is no column 'label', but .*Did you mean --label_column_name labels"):
        load(frame.rename(columns={"label": "labels"}))
    with pytest.raises(UserError, match="1 of 6 clips have no label:\n  - row 3"):
        load(frame.assign(label=["a", "b", None, "a", "b", "a"]))
    with pytest.raises(UserError, match="'exam' is not a split"):
        load(frame.assign(split="exam"))
    with pytest.raises(UserError, match="2 of 6 recordings are not there:\n  - .*gone.wav"):
        load(frame.assign(path=["gone.wav", "lost.wav", *frame["path"][2:]]))
    with pytest.raises(UserError, match="there is no file"):
        manifest.load(DataArguments(data_files=[str(tmp_path / "none.csv")]))
    path.write_text("")
    with pytest.raises(UserError, match="cannot be read as CSV"):
        manifest.load(DataArguments(data_files=[str(path)]))


def test_classes_are_kept_in_the_order_asked_for():
    table = keep_labels(polish.load(DataArguments()), ["neutral", "anger"])
    assert table.features["label"].names == ["neutral", "anger"] and len(table) == 300
    assert [row["label"] for row in table.select([0, 299]).remove_columns("audio")] == [1, 0]
    assert "_a_" not in table[0]["audio"]["path"] and ".a_" in table[0]["audio"]["path"]
    with pytest.raises(UserError, match="no class 'angr'.*Did you mean 'anger'"):
        keep_labels(table, ["angr"])


HUB_PROGRAM = """
import json, sys
from speech_emotion.arguments import DataArguments
from speech_emotion.corpora import hub
from datasets import DatasetDict
from speech_emotion.errors import UserError
try:
    table = hub.load(DataArguments(dataset_name=sys.argv[1], label_column_name=sys.argv[3]), sys.argv[2])
except UserError as error:
    print(json.dumps({"error": str(error)}))
else:
    part = table["train"] if isinstance(table, DatasetDict) else table
    print(json.dumps({"columns": part.column_names, "rows": len(part), "names": part.features["label"].names,
                      "duration": part[0]["duration"], "speakers": part["speaker_id"][:],
                      "splits": list(table) if isinstance(table, DatasetDict) else None}))
"""


def hub_environment(address, folder):
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    return environment | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "home"),
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
    }


def run_hub(address, name, cache, label="label"):
    # In a process of its own: huggingface_hub reads its endpoint when it is imported.
    done = subprocess.run([sys.executable, "-c", HUB_PROGRAM, name, str(cache), label], cwd=ROOT, timeout=120,
                          env=hub_environment(address, cache), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_hub_data_set_in_parquet_and_one_of_audio_files(tmp_path):
    clips = [write_tone(tmp_path / "clips" / f"{i}.wav", seed=i).read_bytes() for i in range(4)]
    table = Dataset.from_dict({"label": [0, 1, 0, 1], "speaker_id": [7, 8, 7, 8]})
    table = table.cast_column("label", ClassLabel(names=["zorn", "angst"]))
    audio = Dataset.from_dict({"audio": [{"bytes": clip, "path": f"{i}.wav"} for i, clip in enumerate(clips)]})
    table = table.add_column("audio", audio["audio"][:]).cast_column("audio", Audio(decode=False)).cast_column("audio", Audio())
    parts = {}
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"{split}.parquet")
        parts[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / f"{split}.parquet").read_bytes()
    files = {f"{'happy' if i % 2 else 'sad'}/{i}.wav": clip for i, clip in enumerate(clips)}
    repos = {"datasets/user/parquet": parts, "datasets/user/files": files}
    with serve(hub_handler(repos)) as address:
        found = run_hub(address, "user/parquet", tmp_path / "a")
        assert set(found["columns"]) == COMMON and found["rows"] == 4 and found["names"] == ["zorn", "angst"]
        assert found["duration"] == pytest.approx(0.5, abs=0.01) and found["speakers"] == ["7", "8", "7", "8"]
        assert found["splits"] == ["train", "test"]
        found = run_hub(address, "user/files", tmp_path / "b")
        assert found["rows"] == 4 and found["names"] == ["happy", "sad"] and found["splits"] is None
        assert "no column 'emotion'" in run_hub(address, "user/parquet", tmp_path / "a", "emotion")["error"]
        assert "'user/none' is not found" in run_hub(address, "user/none", tmp_path / "c")["error"]


MODEL_PROGRAM = """
import sys
from speech_emotion.arguments import ModelArguments
from speech_emotion.modeling import build_model
arguments = ModelArguments(model_name_or_path="user/tiny", cache_dir=sys.argv[1])
model, extractor, _ = build_model(arguments, ["a", "b", "c"], None, 0)
weight = model.wav2vec2.encoder.layers[0].attention.k_proj.weight.sum().item()
print(model.config.num_labels, weight, extractor.sampling_rate)
"""


def test_a_model_loads_by_its_hub_id(tmp_path):
    model = AutoModel.from_config(tiny_config("wav2vec2"))
    model.save_pretrained(tmp_path / "tiny")
    tiny_extractor("wav2vec2").save_pretrained(tmp_path / "tiny")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    with serve(hub_handler({"models/user/tiny": files})) as address:
        done = subprocess.run([sys.executable, "-c", MODEL_PROGRAM, str(tmp_path / "cache")], cwd=ROOT, timeout=120,
                              env=hub_environment(address, tmp_path), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    labels, weight, rate = done.stdout.split()
    expected = model.encoder.layers[0].attention.k_proj.weight.sum().item()
    assert (labels, rate) == ("3", "16000") and float(weight) == pytest.approx(expected)


def test_a_misspelt_corpus_is_told_its_name(tmp_path):
    from speech_emotion.corpora import hub

    with pytest.raises(UserError, match="'thorsten_emotinal'"):
        hub.load(DataArguments(dataset_name="thorsten_emotinal"), str(tmp_path))
