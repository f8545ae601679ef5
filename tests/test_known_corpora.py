"""Loaders of corpora that people bring, on small trees named exactly as the originals."""

import logging

import numpy as np
import pandas as pd
import pytest
from conftest import write_tone
from datasets import DatasetDict

from speech_emotion.arguments import Arguments, DataArguments, ModelArguments
from speech_emotion.corpora import load_corpus
from speech_emotion.corpora.hub import CORPORA
from speech_emotion.errors import UserError
from speech_emotion.splits import split_corpus


def load(name, folder, **changes):
    data = DataArguments(dataset_name=name, data_dir=str(folder), **changes)
    return load_corpus(Arguments(ModelArguments(), data, None, {}, None, []))


def write(root, *names):
    for seed, name in enumerate(names):
        write_tone(root / name, 0.2, 200 + 20 * seed, seed=seed)


def rows(table):
    """Returns {file name: (label, speaker, sentence, session)}."""
    names = table.features["label"].names
    columns = (table["label"], table["speaker_id"], table["sentence_id"], table["session_id"])
    paths = [audio["path"].replace("\\", "/").split("/") for audio in table["audio"]]
    return {"/".join(path[-2:]): (names[label], *rest) for path, label, *rest in zip(paths, *columns, strict=True)}


def test_emodb(tmp_path, caplog):
    names = ("wav/03a01Fa.wav", "wav/03a01Wb.wav", "wav/08b10Tc.wav", "wav/16a07La.wav", "wav/09b03Ed.wav", "wav/10a02Aa.wav")
    write(tmp_path, *names, "wav/11a04Nd.wav")
    with caplog.at_level(logging.WARNING):
        table = load("emodb", tmp_path)
    assert "7 of the 535 recordings" in caplog.text
    assert table.features["label"].names == ["anger", "boredom", "disgust", "fear", "happiness", "neutral", "sadness"]
    found = rows(table)
    assert found["wav/03a01Fa.wav"] == ("happiness", "03", "a01", None) and found["wav/03a01Wb.wav"][0] == "anger"
    assert [found[f"wav/{stem}.wav"][0] for stem in ("08b10Tc", "16a07La", "09b03Ed", "10a02Aa", "11a04Nd")] == [
        "sadness", "boredom", "disgust", "fear", "neutral",
    ]  # fmt: skip


def test_ravdess_speech_and_song(tmp_path):
    write(tmp_path, "Actor_12/03-01-06-01-02-01-12.wav", "Actor_12/03-01-02-02-01-02-12.wav", "Actor_01/03-02-03-01-01-01-01.wav",
          "Actor_02/03-02-05-01-02-01-02.wav")  # fmt: skip
    found = rows(load("ravdess", tmp_path))
    assert found == {"Actor_12/03-01-06-01-02-01-12.wav": ("fearful", "12", "02", None),
                     "Actor_12/03-01-02-02-01-02-12.wav": ("calm", "12", "01", None)}  # fmt: skip
    song = load("ravdess", tmp_path, dataset_config_name="song")
    assert song.features["label"].names == ["happy", "angry"] and set(song["speaker_id"]) == {"01", "02"}
    with pytest.raises(UserError, match="ravdess has no 'opera'"):
        load("ravdess", tmp_path, dataset_config_name="opera")


def test_crema_d(tmp_path):
    write(
        tmp_path,
        "AudioWAV/1001_DFA_ANG_XX.wav",
        "AudioWAV/1001_IEO_HAP_LO.wav",
        "AudioWAV/1091_WSI_SAD_X.wav",
        "AudioWAV/1040_ITH_NEU_XX.wav",
    )
    found = rows(load("crema_d", tmp_path))
    assert found["AudioWAV/1001_DFA_ANG_XX.wav"] == ("anger", "1001", "DFA", None)
    assert found["AudioWAV/1001_IEO_HAP_LO.wav"][0] == "happiness" and found["AudioWAV/1091_WSI_SAD_X.wav"][1] == "1091"


def test_tess_with_its_misnamed_file_and_a_second_copy(tmp_path):
    write(tmp_path, "OAF_Pleasant_surprise/OAF_back_ps.wav", "OAF_neutral/OA_bite_neutral.wav", "YAF_angry/YAF_bite_angry.wav",
          "copy/YAF_angry/YAF_bite_angry.wav", "OAF_Fear/OAF_home_fear.wav")  # fmt: skip
    table = load("tess", tmp_path)
    found = rows(table)
    assert len(table) == 4
    assert found["OAF_neutral/OA_bite_neutral.wav"] == ("neutral", "OAF", "bite", None)
    assert found["OAF_Pleasant_surprise/OAF_back_ps.wav"] == ("pleasant_surprise", "OAF", "back", None)


def test_savee_in_both_layouts(tmp_path):
    names = ("DC/a01.wav", "DC/sa03.wav", "JE/su15.wav", "KL/n30.wav", "JK/d04.wav")
    write(tmp_path / "one" / "AudioData", *names)
    write(tmp_path / "two" / "ALL", *(name.replace("/", "_") for name in names))
    first, second = load("savee", tmp_path / "one"), load("savee", tmp_path / "two")
    found = rows(first)
    assert found["DC/a01.wav"] == ("anger", "DC", "common01", None) and found["DC/sa03.wav"] == (
        "sadness",
        "DC",
        "common03",
        None,
    )
    assert found["JE/su15.wav"] == ("surprise", "JE", "su15", None) and found["KL/n30.wav"][:2] == ("neutral", "KL")
    assert sorted(rows(second).values(), key=str) == sorted(found.values(), key=str)


def test_esd_knows_which_sentence_an_emotion_repeats(tmp_path):
    write(tmp_path / "Emotion Speech Dataset", "0011/Angry/train/0011_000351.wav", "0011/Neutral/test/0011_000001.wav",
          "0004/Happy/evaluation/0004_000701.wav", "0020/Sad/0020_001400.wav")  # fmt: skip
    found = rows(load("esd", tmp_path))
    assert found["train/0011_000351.wav"] == ("angry", "0011", "english_001", None)
    assert found["test/0011_000001.wav"] == ("neutral", "0011", "english_001", None)
    assert found["evaluation/0004_000701.wav"] == ("happy", "0004", "mandarin_001", None)
    assert found["Sad/0020_001400.wav"] == ("sad", "0020", "english_350", None)
    assert len(load("esd", tmp_path, dataset_config_name="english")) == 3


IEMOCAP_HEAD = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"


def make_iemocap(root, num_sessions=3):
    for session in range(1, num_sessions + 1):
        dialogue = f"Ses0{session}F_impro01"
        folder = root / "IEMOCAP_full_release" / f"Session{session}"
        lines = []
        for number, (speaker, label) in enumerate(
            [("F", "neu"), ("M", "exc"), ("F", "hap"), ("M", "ang"), ("F", "sad"), ("M", "xxx"), ("F", "fru")]
        ):
            name = f"{dialogue}_{speaker}{number:03d}"
            write_tone(
                folder / "sentences" / "wav" / dialogue / f"{name}.wav", 0.2, 200 + 30 * number, seed=session * 10 + number
            )
            lines.append(f"[6.2901 - 8.2357]\t{name}\t{label}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n")
        target = folder / "dialog" / "EmoEvaluation" / f"{dialogue}.txt"
        target.parent.mkdir(parents=True)
        target.write_text(IEMOCAP_HEAD + "\n".join(lines), encoding="utf-8")
        (target.parent / f"._{dialogue}.txt").write_bytes(b"\x00\x05\x16\x07")  # as macOS left them in the archive
    return root


def test_iemocap_merges_excitement_and_takes_sessions_for_folds(tmp_path):
    table = load("iemocap", make_iemocap(tmp_path))
    assert table.features["label"].names == ["angry", "happy", "neutral", "sad"] and len(table) == 15
    found = rows(table)
    assert found["Ses02F_impro01/Ses02F_impro01_M001.wav"] == ("happy", "Ses02M", None, "Session2")
    assert found["Ses02F_impro01/Ses02F_impro01_F002.wav"] == ("happy", "Ses02F", None, "Session2")
    split = split_corpus(table, DataArguments(), 0)
    assert split.split_by == ["session_id"] and split.speaker_dependence == "speaker-independent"
    six = load("iemocap", tmp_path, dataset_config_name="6_classes")
    assert six.features["label"].names == ["angry", "happy", "excited", "neutral", "sad", "frustrated"] and len(six) == 18
    (tmp_path / "IEMOCAP_full_release/Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav").unlink()
    with pytest.raises(UserError, match=r"1 labelled recordings are not there:\n.*Ses01F_impro01_F000.wav"):
        load("iemocap", tmp_path)
    assert len(load("iemocap", tmp_path, on_bad_audio="skip")) == 14


def make_meld(root):
    splits = {"train_sent_emo.csv": "train_splits", "dev_sent_emo.csv": "dev_splits_complete",
              "test_sent_emo.csv": "output_repeated_splits_test"}  # fmt: skip
    for list_name, folder in splits.items():
        lines = []
        for dialogue in range(2):
            for utterance, emotion in enumerate(("neutral", "joy", "anger")):
                write_tone(root / folder / f"dia{dialogue}_utt{utterance}.wav", 0.2, 200 + 40 * utterance, seed=dialogue)
                lines.append(
                    {"Sr No.": 1, "Utterance": "It\x92s me, “Joey”", "Speaker": "Joey", "Emotion": emotion,
                     "Sentiment": "neutral", "Dialogue_ID": dialogue, "Utterance_ID": utterance, "Season": 8}
                )  # fmt: skip
        pd.DataFrame(lines).to_csv(root / list_name, index=False)
    return root


def test_meld_keeps_its_splits_and_says_that_speakers_are_shared(tmp_path):
    corpus = load("meld", make_meld(tmp_path))
    assert isinstance(corpus, DatasetDict) and [len(corpus[name]) for name in ("train", "validation", "test")] == [6, 6, 6]
    assert rows(corpus["test"])["output_repeated_splits_test/dia1_utt2.wav"] == ("anger", "Joey", None, "test_dia1")
    split = split_corpus(corpus, DataArguments(), 0)
    assert split.speaker_dependence == "speaker-dependent" and "The results are speaker-dependent." in split.notes
    (tmp_path / "train_splits" / "dia0_utt1.wav").unlink()
    with pytest.raises(UserError, match="1 listed recordings are not there"):
        load("meld", tmp_path)


def test_emov_db_from_archives_and_from_folders(tmp_path):
    write(tmp_path, "bea_Amused/amused_1-15_0001.wav", "sam_Angry/anger_1-28_0028.wav", "jenie_Sleepy/sleepiness_29-56_0030.wav",
          "josh/neutral/neutral_1-28_0001.wav", "bea_Disgusted/disgust_1-28_0002.wav")  # fmt: skip
    found = rows(load("emov_db", tmp_path))
    assert found["bea_Amused/amused_1-15_0001.wav"] == ("amused", "bea", "0001", None)
    assert found["neutral/neutral_1-28_0001.wav"] == ("neutral", "josh", "0001", None)
    assert {label for label, *_ in found.values()} == {"amused", "angry", "sleepy", "neutral", "disgusted"}


def test_msp_podcast_takes_published_splits_and_leaves_unclear_classes_out(tmp_path):
    lines = [("0001_0008", "A", "12", "Train"), ("0001_0009", "N", "12", "Train"), ("0002_0001", "A", "Unknown", "Development"),
             ("0003_0001", "N", "40", "Test1"), ("0003_0002", "A", "40", "Test1"), ("0004_0001", "A", "Unknown", "Test2"),
             ("0005_0001", "X", "7", "Train"), ("0005_0002", "O", "7", "Train")]  # fmt: skip
    frame = pd.DataFrame(lines, columns=["FileName", "EmoClass", "SpkrID", "Split_Set"])
    frame["FileName"] = "MSP-PODCAST_" + frame["FileName"] + ".wav"
    write(tmp_path / "Audios", *frame["FileName"])
    (tmp_path / "Labels").mkdir()
    frame.to_csv(tmp_path / "Labels" / "labels_consensus.csv", index=False)
    corpus = load("msp_podcast", tmp_path)
    assert {name: len(part) for name, part in corpus.items()} == {"train": 2, "validation": 1, "test": 2}
    assert corpus["validation"]["speaker_id"][0] is None and corpus["test"]["speaker_id"][0] == "40"
    assert rows(load("msp_podcast", tmp_path, dataset_config_name="test2")["test"]).keys() == {"Audios/MSP-PODCAST_0004_0001.wav"}
    frame.loc[frame["Split_Set"] == "Test1", "SpkrID"] = "12"  # a speaker in two splits
    frame.to_csv(tmp_path / "Labels" / "labels_consensus.csv", index=False)
    with pytest.raises(UserError, match="the given splits leak: 1 speakers"):
        split_corpus(load("msp_podcast", tmp_path), DataArguments(), 0)


@pytest.mark.parametrize("name", CORPORA)
def test_a_folder_of_something_else_is_refused_with_an_example(name, tmp_path):
    write_tone(tmp_path / "x" / "recording.wav", 0.1)
    with pytest.raises(UserError, match=r"key 'data_dir': .* is not .*(expected|there is no)"):
        load(name, tmp_path)
    with pytest.raises(UserError, match="data_dir"):
        load(name, tmp_path / "nowhere")


def test_the_same_audio_in_two_splits_is_found(tmp_path):
    write(tmp_path, *(f"wav/0{3 + speaker}a0{1 + speaker % 2}{letter}a.wav" for speaker in range(6) for letter in "WN"))
    table = load("emodb", tmp_path)
    assert split_corpus(table, DataArguments(), 0).overlaps[-1]["test in train"] == 0
    write_tone(tmp_path / "wav" / "03a01Wa.wav", 0.2, 500, seed=99)
    write_tone(tmp_path / "wav" / "04a02Wa.wav", 0.2, 500, seed=99)
    split = split_corpus(load("emodb", tmp_path), DataArguments(test_groups=["03"], validation_groups=["05"]), 0)
    assert split.overlaps[-1]["test in train"] == 1 and any("LEAK: 1 test clips" in note for note in split.notes)
    speakers = next(row for row in split.overlaps if row["of"] == "speakers")
    assert speakers == {"of": "speakers", "train": 4, "validation": 1, "test": 1, "test in train": 0, "validation in train": 0,
                        "test in validation": 0}  # fmt: skip


def test_a_share_of_the_training_groups_is_part_of_any_larger_one(tmp_path):
    write(tmp_path, *(f"wav/{3 + speaker:02}a01{letter}a.wav" for speaker in range(12) for letter in "WN"))
    table = load("emodb", tmp_path)
    chosen = {}
    for fraction in (0.1, 0.3, 0.6, 1.0):
        split = split_corpus(table, DataArguments(train_fraction=fraction), 0)
        speakers = np.asarray(split.clips["speaker_id"][:])
        chosen[fraction] = set(speakers[split.indices("train")])
        test = set(speakers[split.indices("test")])
    assert [len(chosen[f]) for f in (0.1, 0.3, 0.6, 1.0)] == [1, 3, 6, 10]
    assert chosen[0.1] < chosen[0.3] < chosen[0.6] < chosen[1.0] and not test & chosen[1.0]
