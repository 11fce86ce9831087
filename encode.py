"""Documents to tokens, on all cores. A document that kills its worker is named; nothing waits for a
dead worker."""

import functools
import json
import multiprocessing
import signal
from collections import Counter, deque
from multiprocessing import connection

import numpy as np

from chat import control_tokens, render_record
from tokenizer import get_tokenizer

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 18, 64  # that a worker gets at a time
FORMATS = ("text", "messages", "conversations", "conversation", "completion")


def encode_text(text, tokenizer):
    if not isinstance(text, str) or not text:
        raise ValueError("the text is empty" if text == "" else '"text" must be a string')
    tokens = np.array([*tokenizer.encode(text), tokenizer.end], np.uint32)
    return tokens, np.ones(len(tokens), bool)


def unique_keys(pairs):
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return record


def encode_record(record, tokenizer, history, ignore):
    """A JSON object -> tokens (uint32), counted (bool), notes: (kind, detail) -> how often."""
    given = [key for key in FORMATS if isinstance(record, dict) and record.get(key) is not None]
    if len(given) != 1 or (given == ["completion"] and record.get("prompt") is None):
        raise ValueError(
            'needs a JSON object with either "text" or "messages" (or "conversations", or "prompt" '
            'and "completion")'
        )
    if given != ["text"]:
        return render_record(record, tokenizer, history, ignore)
    notes = Counter(
        ("ignored", key) for key, v in record.items() if key != "text" and v is not None
    )
    tokens, counted = encode_text(record["text"], tokenizer)
    notes.update(("control", name) for name in control_tokens(record["text"]))
    return tokens, counted, notes


def encode_document(document, tokenizer, history="keep", ignore=()):
    """A document of sources.py -> tokens, counted, notes. ValueError, which names the place."""
    where, kind, content = document
    try:
        if kind != "record":
            content = content.decode("utf-8-sig")
        if kind == "json":
            content = json.loads(content, object_pairs_hook=unique_keys)
        elif kind == "text":
            content = {"text": content}
        return encode_record(content, get_tokenizer(tokenizer), history, ignore)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # Unicode errors are ValueErrors
        raise ValueError(f"{where}: {error}") from error


# --------------------------------------------------------------------------------------------------
# Workers


def work(pipe, parents_end, encode):
    """Encode the documents that come through `pipe`, and send back what each becomes."""
    parents_end.close()  # a copy of it would keep the pipe open after the parent's death
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            batch = pipe.recv()
        except (EOFError, OSError):  # the parent is gone, or done
            return
        for document in batch:
            try:
                result = encode(document)
            except (KeyboardInterrupt, SystemExit):
                raise
            except ValueError as error:
                result = str(error)
            except BaseException as error:  # also a panic of a tokenizer, which is no Exception
                result = f"{document[0]}: {type(error).__name__}: {' '.join(str(error).split())}"
            pipe.send(result)


class Worker:
    def __init__(self, encode):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(
            target=work, args=(theirs, self.pipe, encode), daemon=True
        )
        self.process.start()
        theirs.close()  # so that its death ends the pipe
        self.batch, self.results = [], []

    @property
    def idle(self):
        return len(self.results) == len(self.batch)

    def receive(self):
        try:
            self.results.append(self.pipe.recv())
        except (EOFError, ConnectionResetError):
            self.process.join()
            code, where = self.process.exitcode, self.batch[len(self.results)][0]
            died = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise ValueError(
                f"{where}: the worker that encoded this died {died}: is memory short?"
            ) from None


def batches(documents):
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[2]) if document[1] != "record" else len(str(document[2]))
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(documents, number, **settings):
    """Documents -> (where, result) of each, in order, by `number` workers. A result is what
    encode_document returns for these settings, or the text of its error.

    ValueError with the place of a document that a worker died of."""
    encode = functools.partial(encode_document, **settings)
    workers, waiting, coming = [], deque(), batches(documents)  # waiting: (batch, results) in order
    try:
        workers = [Worker(encode) for _ in range(number)]
        while True:
            for worker in workers:
                if worker.idle and len(waiting) < 4 * number and (batch := next(coming, None)):
                    worker.batch, worker.results = batch, []
                    waiting.append((batch, worker.results))
                    try:
                        worker.pipe.send(batch)
                    except OSError:  # it is dead
                        worker.receive()
            if not waiting:
                return
            busy = {worker.pipe: worker for worker in workers if not worker.idle}
            for pipe in connection.wait(list(busy)) if busy else ():
                busy[pipe].receive()
            while waiting and len(waiting[0][0]) == len(waiting[0][1]):
                batch, results = waiting.popleft()
                yield from ((document[0], result) for document, result in zip(batch, results))
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
