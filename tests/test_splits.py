"""No two splits share a group; the split is the same wherever it is drawn."""

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora import polish
from speech_emotion.corpora.table import Clip, build_table
from speech_emotion.errors import UserError
from speech_emotion.splits import SPLITS, split_corpus, write_splits


def make_corpus(speakers=6, sentences=5, labels=("a", "b"), splits=None):
    clips = [
        Clip(path=f"/data/{label}/{speaker}_{sentence}.wav", label=label, speaker_id=f"s{speaker}" if speakers else None,
             sentence_id=f"t{sentence}" if sentences else None, split=splits(speaker, sentence) if splits else None)
        for label in labels for speaker in range(max(speakers, 1)) for sentence in range(max(sentences, 1))
    ]  # fmt: skip
    return build_table(clips, list(labels))


def groups(split, column):
    return [set(np.asarray(split.clips[column], dtype=object)[split.indices(name)]) for name in SPLITS]


def assert_apart(split, column):
    train, validation, test = groups(split, column)
    assert train and validation and test
    assert not (train & validation or train & test or validation & test)


@pytest.mark.parametrize("seed", range(5))
def test_speakers_are_kept_apart_where_there_are_three(seed):
    split = split_corpus(make_corpus(), DataArguments(), seed)
    assert split.split_by == ["speaker_id"]
    assert_apart(split, "speaker_id")
    assert [len(part) for part in groups(split, "speaker_id")] == [4, 1, 1]
    assert "Of the 5 test sentences, 5 are in training as well." in split.notes
    assert "The results are speaker-independent." in split.notes


def test_sentences_are_kept_apart_where_there_is_one_speaker():
    split = split_corpus(make_corpus(speakers=1, sentences=20), DataArguments(), 0)
    assert split.split_by == ["sentence_id"]
    assert_apart(split, "sentence_id")
    assert [len(part) for part in groups(split, "sentence_id")] == [16, 2, 2]
    assert "The results are speaker-dependent." in split.notes


def test_both_are_kept_apart_and_bridging_clips_counted():
    split = split_corpus(make_corpus(8, 8), DataArguments(split_by=["speaker_id", "sentence_id"]), 1)
    assert_apart(split, "speaker_id")
    assert_apart(split, "sentence_id")
    kept = len(split.clips)
    assert kept == 2 * (6 * 6 + 1 + 1)
    assert f"{128 - kept} of 128 clips would bridge" in " ".join(split.notes)


def test_without_groups_clips_are_split_singly_and_it_is_said():
    split = split_corpus(make_corpus(speakers=0, sentences=0).select([0] * 30 + [1] * 30), DataArguments(), 0)
    assert split.split_by == [] and "Neither speakers nor sentences are known" in split.notes[0]


def test_the_split_depends_on_the_seed_alone():
    first, second = (split_corpus(make_corpus(10, 3), DataArguments(), 4).clips["split"][:] for _ in range(2))
    assert first == second
    assert any(first != split_corpus(make_corpus(10, 3), DataArguments(), seed).clips["split"][:] for seed in range(5))


def test_labels_are_stratified_as_far_as_groups_allow():
    # Ten sentences have class a only, ten class b only: a draw that ignores labels often tests one class alone.
    clips = [
        Clip(path=f"{i}_{j}.wav", label="a" if i < 10 else "b", speaker_id=None, sentence_id=f"t{i}", split=None)
        for i in range(20) for j in range(3)
    ]  # fmt: skip
    for seed in range(10):
        split = split_corpus(build_table(clips), DataArguments(), seed)
        labels = np.asarray(split.clips["label"])
        assert all(set(labels[split.indices(name)]) == {0, 1} for name in SPLITS)


def test_named_groups_are_taken():
    split = split_corpus(polish.load(DataArguments()), DataArguments(test_groups=["m4"], validation_groups=["m2"]), 0)
    assert groups(split, "speaker_id") == [{"m1", "m3", "m5"}, {"m2"}, {"m4"}]
    with pytest.raises(UserError, match="key 'test_groups': no speaker_id 'm9' in the corpus, but m1, m2"):
        split_corpus(polish.load(DataArguments()), DataArguments(test_groups=["m9"]), 0)


def test_given_splits_are_respected():
    corpus = make_corpus(splits=lambda speaker, _: SPLITS[min(speaker, 2)])
    split = split_corpus(corpus, DataArguments(), 0)
    assert groups(split, "speaker_id")[0] == {"s0"} and groups(split, "speaker_id")[1] == {"s1"}


def test_a_leak_between_given_splits_is_an_error_unless_allowed():
    corpus = make_corpus(splits=lambda _, sentence: SPLITS[sentence % 3])
    with pytest.raises(UserError, match="6 speakers in more than one.*--allow_group_leak"):
        split_corpus(corpus, DataArguments(), 0)
    split = split_corpus(corpus, DataArguments(allow_group_leak=True), 0)
    assert "LEAK (allowed): 6 speakers in more than one split." in split.notes


def test_a_missing_validation_split_is_drawn_from_train_by_groups():
    corpus = make_corpus(splits=lambda speaker, _: "test" if speaker == 0 else "train")
    split = split_corpus(corpus, DataArguments(), 0)
    assert groups(split, "speaker_id")[2] == {"s0"} and len(groups(split, "speaker_id")[1]) == 1
    assert_apart(split, "speaker_id")


def test_a_label_in_the_test_split_only_is_refused_by_name():
    corpus = make_corpus(splits=lambda speaker, _: SPLITS[min(speaker, 2)])
    test = corpus["test"].filter(lambda label: label == 1, input_columns="label")
    train = corpus["train"].filter(lambda label: label == 0, input_columns="label")
    with pytest.raises(UserError, match=r"no training clip.*\n  - b \(validation, test\)"):
        split_corpus(DatasetDict(train=train, validation=corpus["validation"], test=test), DataArguments(), 0)


def test_a_class_with_one_clip_goes_to_training():
    table = make_corpus(1, 12)
    lonely = build_table([Clip(path="c.wav", label="c", speaker_id="s0", sentence_id="t99", split=None)], ["a", "b", "c"])
    records = [*table.to_list(), *lonely.to_list()]
    for record in records[:-1]:
        record["label"] = int(record["label"])
    corpus = Dataset.from_list(records, features=None).cast(lonely.features)
    for seed in range(5):
        split = split_corpus(corpus, DataArguments(), seed)
        assert split.clips["split"][len(split.clips) - 1] == "train"
        assert any("no clip of c" in note for note in split.notes)


def test_too_few_groups_say_so():
    with pytest.raises(UserError, match="2 speakers cannot make 3 splits"):
        split_corpus(make_corpus(2, 9), DataArguments(split_by=["speaker_id"]), 0)
    with pytest.raises(UserError, match="speaker_id is not known for every clip"):
        split_corpus(make_corpus(0, 9), DataArguments(split_by=["speaker_id"]), 0)


def test_splits_csv_has_its_columns_and_no_local_path(tmp_path):
    split = split_corpus(polish.load(DataArguments()), DataArguments(), 0)
    write_splits(split, tmp_path / "splits.csv")
    frame = pd.read_csv(tmp_path / "splits.csv")
    assert list(frame.columns) == ["path", "label", "split", "speaker_id", "sentence_id"]
    assert len(frame) == 450 and frame["path"].str.fullmatch(r"m\d\.[asn]_[a-z]+_\d\.flac").all()
    assert frame.groupby("speaker_id")["split"].nunique().max() == 1
