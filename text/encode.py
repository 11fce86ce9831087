"""Documents to tokens, on all cores. A document that kills its worker is named; nothing waits for a
dead worker."""

import contextlib
import functools
import json
import multiprocessing
import signal
import threading
from collections import Counter, deque
from multiprocessing import connection

import numpy as np

from chat import control_tokens, render_record
from text.tokenizer import get_tokenizer

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 18, 64  # that a worker gets at a time
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
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
            'needs a JSON object with either "text" or "messages" (or "conversations", '
            '"conversation", or "prompt" and "completion")'
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


def encode_batch(batch, encode, place):
    """The result of each document: tokens, counted, notes, or the text of an error."""
    results = []
    for place.value, document in enumerate(batch):
        try:
            results.append(encode(document))
        except ValueError as error:
            results.append(str(error))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # also a panic of a tokenizer, which is no Exception
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            results.append(f"{document[0]}: {text}")
    return results


@contextlib.contextmanager
def signals_later():
    """Signals that come in the block are handled after it. What a handler raises in a hook of a
    fork, such as logging's, or in a pipe's __del__, is printed and lost: the program goes on."""
    came, before = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            before[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)


def work(pipe, parents_end, place, encode):
    """Encode the batches that come through `pipe`, and send back what they become."""
    parents_end.close()  # a copy of it would keep the pipe open after the parent's death
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    while True:
        try:
            pipe.send(encode_batch(pipe.recv(), encode, place))
        except (EOFError, OSError):  # the parent is gone
            return


class Worker:
    """A process that encodes a batch at a time."""

    def __init__(self, encode):
        self.pipe, theirs = multiprocessing.Pipe()
        self.place = multiprocessing.RawValue("q")  # of the document that it encodes, in its batch
        self.process = multiprocessing.Process(
            target=work, args=(theirs, self.pipe, self.place, encode), daemon=True
        )
        self.process.start()
        theirs.close()  # so that its death ends the pipe

    def start(self, batch):
        self.batch, self.place.value = batch, 0
        with contextlib.suppress(OSError):  # it is dead: results() will find out
            self.pipe.send(batch)

    def results(self):
        """Of its batch, see encode_batch. ValueError if it died, with the document it died of."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code, where = self.process.exitcode, self.batch[self.place.value][0]
            died = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise ValueError(
                f"{where}: the worker that encoded this died {died}: is memory short?"
            ) from None


def batches(documents):
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[2])  # bytes, or the keys of a record
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(documents, number, **settings):
    """Documents -> (where, result) of each, in order, by `number` workers. A result is what
    encode_document returns for these settings, or the text of its error.

    ValueError with the place of the document that a worker died of."""
    encode = functools.partial(encode_document, **settings)
    workers, waiting, coming = [], deque(), batches(documents)  # waiting: [batch, results] in order
    try:
        with signals_later():
            workers = [Worker(encode) for _ in range(number)]
        slots = {}  # busy worker -> its element of `waiting`
        while True:
            for worker in workers:
                if worker not in slots and len(waiting) < 4 * number and (b := next(coming, None)):
                    slots[worker] = [b, None]
                    waiting.append(slots[worker])
                    worker.start(b)
            if not waiting:
                return
            pipes = {worker.pipe: worker for worker in slots}
            for pipe in connection.wait(list(pipes)) if pipes else ():
                slots.pop(pipes[pipe])[1] = pipes[pipe].results()
            while waiting and waiting[0][1] is not None:
                batch, results = waiting.popleft()
                yield from ((document[0], result) for document, result in zip(batch, results))
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
