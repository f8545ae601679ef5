"""The Thorsten emotional corpus (OpenSLR 110, CC0): one German speaker, 300 sentences in 8 styles.

T. Müller and D. Kreutz, "Thorsten-Voice dataset emotional", doi 10.5281/zenodo.5525023, https://www.openslr.org/110/.
A folder for each style holds `<md5 of the sentence>.wav`, 22,050 Hz mono; `thorsten-emotional-metadata.csv` lists
`id|sentence`. The published archive lacks one clip, so that there are 2,399.
"""

import hashlib
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import datasets
from datasets import Dataset
from tqdm.auto import tqdm

from speech_emotion.arguments import DataArguments
from speech_emotion.corpora.table import Clip, CorpusFacts, build_table
from speech_emotion.errors import UserError, list_offenders

FACTS = CorpusFacts(
    title="Thorsten-Voice emotional (OpenSLR 110)",
    language=("de",),
    nature="acted",
    speakers="1 male speaker",
    license="CC0",
    url="https://www.openslr.org/110/",
    citation="T. Müller, D. Kreutz: Thorsten-Voice dataset emotional. doi 10.5281/zenodo.5525023, 2021.",
)
logger = logging.getLogger(__name__)

ARCHIVE_URL = "https://www.openslr.org/resources/110/thorsten-emotional_v02.tgz"
ARCHIVE_NUM_BYTES = 399_301_812
ARCHIVE_MD5 = "f19585f3759c6d026757c46024a37aa4"
TOP_FOLDER = "thorsten-emotional_v02"
METADATA_FILE = "thorsten-emotional-metadata.csv"
STYLES = ["amused", "angry", "disgusted", "drunk", "neutral", "sleepy", "surprised", "whisper"]
# Drunk, sleepy and whisper are ways of speaking rather than emotions.
CONFIGURATIONS = {"styles": STYLES, "emotions": ["amused", "angry", "disgusted", "neutral", "surprised"]}
NEVER_PUBLISHED = {"whisper/2cc2cc4a34b961ef1657cc82dbd18875.wav"}
SPEAKER = "thorsten"

NUM_ATTEMPTS = 5
TIMEOUT_SECONDS = 30
CHUNK_NUM_BYTES = 1 << 20


def load(data: DataArguments, cache_dir: str | None = None) -> Dataset:
    """Loads the corpus from `data_dir` (its folder or its .tgz), or downloads it.

    Returns:
        The common table, with the further column `sentence` (its text); `sentence_id` is the file's stem, the same in
        every style. `dataset_config_name` "emotions" keeps 5 of the 8 styles.

    Raises:
        UserError: an unknown configuration, a broken archive, a folder of another layout, or clips that are missing
            beyond the one that was never published (unless `on_bad_audio` is "skip").
    """
    configuration = data.dataset_config_name or "styles"
    if configuration not in CONFIGURATIONS:
        raise UserError(
            f"key 'dataset_config_name': thorsten_emotional has no '{configuration}', but {' and '.join(CONFIGURATIONS)}."
        )
    root = find_corpus(data.data_dir, Path(cache_dir or datasets.config.HF_DATASETS_CACHE), data.download_url)
    return _read_folder(root, CONFIGURATIONS[configuration], data.on_bad_audio)


def find_corpus(data_dir: str | None, cache_dir: Path, url: str | None = None) -> Path:
    """Returns the corpus's folder, after downloading and extracting what is not there yet."""
    extracted = cache_dir / "thorsten_emotional" / TOP_FOLDER
    if data_dir is None:
        if not extracted.is_dir():
            archive = extracted.parent / Path(ARCHIVE_URL).name
            download(url or ARCHIVE_URL, archive, ARCHIVE_NUM_BYTES, ARCHIVE_MD5)
            extract(archive, extracted)
            archive.unlink()  # 400 MB that are not needed any more
        return extracted
    path = Path(data_dir).expanduser()
    if path.is_file():
        check_archive(path, ARCHIVE_NUM_BYTES, ARCHIVE_MD5)
        if not extracted.is_dir():
            extract(path, extracted)
        return extracted
    for folder in (path, path / TOP_FOLDER):
        if all((folder / style).is_dir() for style in STYLES):
            return folder
    raise UserError(
        f"key 'data_dir': {path} is not the Thorsten emotional corpus: expected the folder {TOP_FOLDER} with "
        f"{', '.join(STYLES)} in it, or the archive {Path(ARCHIVE_URL).name}."
    )


def _read_folder(root: Path, styles: list[str], on_bad_audio: str) -> Dataset:
    sentences = _read_sentences(root / METADATA_FILE)
    stems = {style: {path.stem for path in (root / style).glob("*.wav")} for style in styles}
    expected = set(sentences) or set().union(*stems.values())
    missing = [
        name
        for style in styles
        for name in sorted(f"{style}/{stem}.wav" for stem in expected - stems[style])
        if name not in NEVER_PUBLISHED
    ]
    if missing:
        message = f"{root}: {len(missing)} clips of the corpus are not there:\n{list_offenders(missing)}"
        if on_bad_audio == "error":
            raise UserError(f"{message}\nExtract the archive again, or go on without them: --on_bad_audio skip.")
        logger.warning(message)
    clips = [
        Clip(path=str(root / style / f"{stem}.wav"), label=style, speaker_id=SPEAKER, sentence_id=stem, split=None)
        for style in styles
        for stem in sorted(stems[style])
    ]
    if not clips:
        raise UserError(f"{root}: its folders hold no .wav files. Extract the archive again.")
    table = build_table(clips, styles)
    return table.add_column("sentence", [sentences.get(stem) for stem in table["sentence_id"]])


def _read_sentences(path: Path) -> dict[str, str]:
    if not path.is_file():
        logger.warning(f"{path} is not there: the clips have no sentence texts, and whether all are there is not known.")
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("|", maxsplit=1) for line in lines if "|" in line)


def download(url: str, destination: Path, num_bytes: int, md5: str) -> None:
    """Downloads `url` to `destination`, going on where an earlier try broke off.

    The file is written to `destination` + ".part" and renamed once its size and md5 are right.

    Raises:
        UserError: the server cannot be reached or breaks off again and again (what has come is kept for the next
            try), or what it sends is not the published file.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(destination.name + ".part")
    if shutil.disk_usage(destination.parent).free < 3 * num_bytes:
        raise UserError(f"{destination.parent}: too little space for the download and its extraction ({3 * num_bytes:,} bytes).")
    problem: Exception | str = "it broke off"
    for attempt in range(NUM_ATTEMPTS):
        try:
            if attempt:
                time.sleep(min(2**attempt, 10) * _RETRY_SECONDS)
            _download_rest(url, part, num_bytes)
            if part.stat().st_size >= num_bytes:
                break
        except (urllib.error.URLError, OSError) as error:
            if isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in (408, 429):
                raise UserError(
                    f"{url}: the server answers {error.code} ({error.reason}). Another mirror: --download_url."
                ) from error
            if isinstance(error, OSError) and not isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError):
                raise  # the disk, not the network
            problem = error
    else:
        have = part.stat().st_size if part.exists() else 0
        raise UserError(
            f"{url}: cannot be downloaded ({problem}). {have:,} of {num_bytes:,} bytes are kept: run again to go on, or "
            "download it yourself and name it with --data_dir."
        )
    try:
        check_archive(part, num_bytes, md5)
    except UserError:
        part.unlink()
        raise
    part.replace(destination)


_RETRY_SECONDS = 1.0  # multiplied by 2, 4, 8 and 10 between the attempts


def _download_rest(url: str, part: Path, num_bytes: int) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have >= num_bytes:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        resumed = response.status == 206  # a server without ranges sends the whole file again, with 200
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=num_bytes, initial=have if resumed else 0, unit="B", unit_scale=True, desc=Path(url).name) as bar,
        ):
            while chunk := response.read(CHUNK_NUM_BYTES):
                file.write(chunk)
                bar.update(len(chunk))


def check_archive(path: Path, num_bytes: int, md5: str) -> None:
    """Raises `UserError` unless the file has this size and md5."""
    size = path.stat().st_size
    if size != num_bytes:
        raise UserError(f"{path}: has {size:,} bytes, the published archive {num_bytes:,}. Download it again.")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != md5:
        raise UserError(f"{path}: has md5 {digest}, the published archive {md5}. Download it again.")


def extract(archive: Path, folder: Path) -> None:
    """Extracts the archive's top folder to `folder`; an extraction that breaks off leaves no such folder.

    Raises:
        UserError: not an archive, or one with a member that would land outside: an absolute path, a `..`, a link or a
            device.
    """
    work = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        with tarfile.open(archive) as tar:
            members = tar.getmembers()
            hostile = [
                m.name for m in members
                if not (m.isfile() or m.isdir()) or m.name.startswith(("/", "\\")) or ".." in Path(m.name).parts
            ]  # fmt: skip
            if hostile:
                raise UserError(
                    f"{archive}: not extracted, since {len(hostile)} of its members are links or lead outside:\n"
                    f"{list_offenders(hostile)}"
                )
            for member in tqdm(members, desc=f"Extracting {archive.name}", unit="file"):
                tar.extract(member, work, filter="data")
        if not (work / TOP_FOLDER).is_dir():
            raise UserError(f"{archive}: has no folder {TOP_FOLDER}, so it is another archive.")
        (work / TOP_FOLDER).replace(folder)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive}: cannot be extracted ({error}). Download it again.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
