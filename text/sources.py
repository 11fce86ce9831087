"""Where documents come from: text, JSON and Parquet files, folders of them, data sets of the Hub.

    one.txt                      one document, or several with a separator between them
    chats.jsonl                  a JSON object a line
    chats.json                   a JSON array of objects, or objects one after the other
    rows.parquet                 a record a row; needs pyarrow
    corpus.jsonl.gz, .zst        the first three compressed; .zst needs pyarrow
    folder                       all of these in it, in the order of their names
    owner/name, owner/name:part  a data set of the Hugging Face Hub; needs huggingface-hub

A document is (where, kind, content): "file:line" for messages; "text" or "json", which is bytes, or
"record", which is a dict.
"""

import fnmatch
import gzip
import io
import json
import os
import re
import stat
import zlib

KINDS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"  # a byte order mark is no part of the text
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:.+)?")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def kind_of(path):
    """The suffix that says how to read a file, or None."""
    name, inner = path.lower(), os.path.splitext(path.lower())
    if inner[1] in COMPRESSED:
        name = inner[0] if not inner[0].endswith(".parquet") else ""
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def optional(name, purpose):
    """A package that only some sources need."""
    try:
        return __import__(name, fromlist=["x"])
    except ImportError:
        package = name.split(".")[0].replace("_", "-")
        raise ValueError(f"{purpose} needs {package}: pip install {package}") from None


# --------------------------------------------------------------------------------------------------
# Finding files


def find_files(source):
    """A file, a folder or a name on the Hub -> [(what messages call it, path)].

    ValueError or OSError for what cannot be read, before anything is."""
    try:
        mode = os.stat(source).st_mode
    except (FileNotFoundError, NotADirectoryError):
        local = kind_of(source.partition(":")[0]) or os.path.isdir(source.split("/")[0])
        if HUB_NAME.fullmatch(source) and not local:
            return find_on_hub(source)
        raise
    if stat.S_ISDIR(mode):
        if os.path.exists(os.path.join(source, "tokens.bin")):
            raise ValueError(f"{source}: is a corpus already: train on it, or look with --show=3")
        paths = []
        for folder, folders, names in os.walk(source):
            folders[:] = [name for name in folders if not name.startswith(".")]  # .git, .cache
            names = [name for name in names if name not in DESCRIPTIONS and name[0] != "."]
            paths += [os.path.join(folder, name) for name in names if kind_of(name)]
        if not paths:
            raise ValueError(f"{source}: holds no {', '.join(KINDS)} file")
    elif not kind_of(source):
        raise ValueError(
            f"{source}: needs to be a .txt (one document), .jsonl (one document a line), .json "
            f"or .parquet file, also as .txt.gz and the like, or a folder of them"
        )
    else:
        paths = [source]
    for path in sorted(paths):
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a FIFO may wait for ever
            raise ValueError(f"{path}: is not a regular file")
        open(path, "rb").close()  # unreadable: now, not after hours
        if path.lower().endswith(".zst"):
            optional("pyarrow", f"{path}: a .zst file")
        if kind_of(path) == ".parquet":
            optional("pyarrow.parquet", f"{path}: a .parquet file")
    return [(path, path) for path in sorted(paths)]


def part_of(path):
    """The part that a file belongs to: data/train-00000-of-00003.parquet -> train."""
    path = path.removeprefix("data/")
    stem = re.sub(rf"({'|'.join(map(re.escape, KINDS))})(\.gz|\.zst)?$", "", path, flags=re.I)
    return re.sub(r"[-_.]\d{3,}(-of-\d+(-[0-9a-f]+)?)?$|/\d{4,}$", "", stem)


def find_on_hub(source):
    """Download the files of a data set. A name after a colon chooses a part (train, de/test) or
    files by a pattern. Without it there must be one part, so that nobody trains on a test set."""
    hub = optional("huggingface_hub", f"{source}: no such file or folder; a Hub data set")
    repository, _, part = source.partition(":")
    try:
        names = hub.HfApi().list_repo_files(repository, repo_type="dataset")
    except Exception as error:
        raise OSError(
            f"{source}: no such file or folder, and no such data set of the Hub could be read: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    names = [name for name in sorted(names) if kind_of(name)]
    names = [name for name in names if os.path.basename(name) not in DESCRIPTIONS]
    parts = sorted({part_of(name) for name in names})
    if part:
        names = [name for name in names if part_of(name) == part or fnmatch.fnmatch(name, part)]
    if not names:
        raise ValueError(f"{source}: has no such part: {', '.join(parts) or 'no readable file'}")
    if not part and len(parts) > 1:
        shown = ", ".join(parts[:10]) + (f" and {len(parts) - 10} more" if len(parts) > 10 else "")
        raise ValueError(f"{source}: choose one of its parts with {source}:{parts[0]}: {shown}")
    try:
        paths = [hub.hf_hub_download(repository, name, repo_type="dataset") for name in names]
    except Exception as error:
        raise OSError(f"{source}: {' '.join(str(error).split())[:300]}") from error
    return [(f"{repository}/{name}", path) for name, path in zip(names, paths)]


# --------------------------------------------------------------------------------------------------
# Reading files


def uncompressed(file, path):
    if path.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if path.lower().endswith(".zst"):
        arrow = optional("pyarrow", f"{path}: a .zst file")
        return io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(file), "zstd"))
    return file


def read_documents(files, separator=None, progress=lambda number: None):
    """[(name, path)] -> documents. `progress` is told the bytes read of each file, compressed."""
    for name, path in files:
        try:
            with open(path, "rb") as file:
                documents = read_file(uncompressed(file, path), name, path, separator)
                done = 0
                for document in documents:
                    here = file.tell() if kind_of(path) != ".parquet" else done
                    progress(here - done)
                    done = here
                    yield document
                progress(os.path.getsize(path) - done)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{name}: is cut short or damaged: {error}") from error
        except OSError as error:  # a read error names no file
            if error.filename is not None:
                raise
            raise OSError(f"{name}: {' '.join(str(error).split())}") from error


def read_file(file, name, path, separator):
    kind = kind_of(path)
    if kind == ".parquet":
        yield from read_parquet(name, path)
    elif kind == ".json":
        yield from read_values(file.read(), name, 1)
    elif kind == ".txt":
        yield from read_text(file.read(), name, separator)
    else:
        started = False
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if not started and line.lstrip().startswith(b"["):  # an array, called .jsonl
                yield from read_values(line + file.read(), name, number)
                return
            if line.strip():
                started = True
                yield f"{name}:{number}", "json", line


def read_text(content, name, separator):
    """One document, or those between separators, without the line breaks around each."""
    content = content.removeprefix(BOM)
    if separator is None:
        yield name, "text", content
        return
    number = 1
    for piece in content.split(separator.encode()):
        text = piece.strip(b"\r\n")
        if text.strip():
            line = number + piece[: piece.find(text)].count(b"\n")
            yield f"{name}:{line}", "text", text
        number += piece.count(b"\n")


def read_values(content, name, number):
    """The elements of a JSON array, or JSON values one after the other, each as bytes. Holds the
    whole file in memory."""
    try:
        text = content.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = number + content.count(b"\n", 0, error.start)
        raise ValueError(f"{name}:{line}: {error}") from error
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    place = blank.match(text).end()
    array = text.startswith("[", place)
    place, counted = blank.match(text, place + array).end(), 0
    while place < len(text) and not (array and text[place] == "]"):
        number += text.count("\n", counted, place)
        counted = place
        try:
            _, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            line = number + text.count("\n", counted, error.pos)
            raise ValueError(f"{name}:{line}: not JSON: {error.msg}") from error
        except RecursionError as error:
            raise ValueError(f"{name}:{number}: {error}") from error
        yield f"{name}:{number}", "json", text[place:end].encode()
        place = blank.match(text, end).end()
        if array:
            if not text.startswith((",", "]"), place):
                raise ValueError(f"{name}:{number}: not JSON: the array is cut short")
            if text[place] == ",":
                place = blank.match(text, place + 1).end()
    if array and (place >= len(text) or text[place + 1 :].strip()):
        raise ValueError(f"{name}: not JSON: the array is cut short, or more follows it")


def read_parquet(name, path):
    """Rows as dicts. Arrow cannot tell a missing key of a struct from null: both are absent."""
    arrow = optional("pyarrow", f"{name}: a .parquet file")
    parquet = optional("pyarrow.parquet", f"{name}: a .parquet file")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", "record", without_nulls(record)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{name}: cannot be read after row {number}: {' '.join(str(error).split())[:300]}"
        ) from error


def without_nulls(value):
    """`value` without the null entries of its dicts, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
