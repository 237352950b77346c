"""Killed in the middle of an answer, twenty times over, in one conversation: nothing is lost but what was said since
the last checkpoint, and the next start goes on. The program is the real one without its page, with the embedded model.
"""
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from app.chat.answers import CHECKPOINT_SECONDS
from app.chat.chats import Chats
from engine import Options, demo_model

KILLS = 20
LOST_SECONDS = CHECKPOINT_SECONDS + 1.2  # a checkpoint may have to wait for a machine that others keep busy
SETTINGS = {"temperature": 1.0, "seed": 5, "max_tokens": 300}


def live(data: str, finish: bool) -> None:
    """One life of the program: a question and another one behind it, whenever none waits. finish: until all that waited
    is answered."""
    from app.server import Parts

    parts = Parts.make(Path(data), demo_model(), Options("exact", device="cpu"))
    chats, jobs = parts.chats, parts.jobs
    conversation = (chats.conversations() or [chats.create(settings=SETTINGS)])[0].id
    jobs.start()
    parts.models.open()
    told = 0
    while not finish or not told or chats.waiting() or _unanswered(chats, conversation):
        answer = jobs.live
        if not answer and not chats.waiting():
            ask(chats, jobs, conversation)
        if answer and answer.text and answer.revision != told:
            told = answer.revision
            print(answer.message_id, len(answer.text), time.time(), flush=True)
        time.sleep(0.005)


def _unanswered(chats, conversation: int) -> bool:
    """Asked after the queue: what has left it is a message, whether or not its answer is already `jobs.live`."""
    last = chats.path(conversation)[-1]
    return last.role == "user" or last.status == "running"


def ask(chats, jobs, conversation: int) -> None:
    n = sum(message.role == "user" for message in chats.path(conversation))
    asked = [f"{n}: tell me a long story.", f"{n}: and then?"]
    print(json.dumps(asked), flush=True)
    for question in asked:
        jobs.send(conversation, question)


def nursery() -> None:
    """Every line of standard input is a life, in a process forked from this one, which has imported everything and
    loaded what is compiled for this processor: each life would."""
    import app.server  # noqa: F401
    import engine.hf  # noqa: F401
    from kernels.dispatch import compile_all

    compile_all()
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            live(**json.loads(line))
            os._exit(0)
        print("pid", pid, flush=True)
        os.waitpid(pid, 0)
        print("over", flush=True)


@contextmanager
def program():
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               bufsize=1, env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                                                            "PYTHONPATH": str(Path(__file__).parents[3])})
    yield process
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


def lived(process, data: Path, chance: random.Random | None) -> tuple[list[str], list[tuple], float]:
    """-> what was asked, (message, characters, moment) of the answers, when it was killed. chance None: lived to the
    end."""
    print(json.dumps({"data": str(data), "finish": chance is None}), file=process.stdin)
    asked, said, killed, pid = [], [], 0.0, 0
    later = chance.uniform(0, 2 * LOST_SECONDS) if chance else float("inf")
    while (line := process.stdout.readline()) != "over\n":
        assert line, "the program failed by itself"
        if line.startswith("["):
            asked += json.loads(line)
        elif line.startswith("pid"):
            pid = int(line.split()[1])
        else:
            number, length, moment = line.split()
            said.append((int(number), int(length), float(moment)))
            if not killed and said[-1][2] - said[0][2] >= later:
                os.kill(pid, signal.SIGKILL)
                killed = time.time()
    return asked, said, killed or time.time()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_in_mid_answer_nothing_is_lost_and_the_conversation_goes_on(tmp_path):
    if not (demo_model() / "floe.json").is_file():
        pytest.skip("the embedded model (assets/demo) has not been built")
    (tmp_path / "cache").mkdir()
    chance, kept, questions, interrupted = random.Random(11), {}, [], 0
    with program() as process:
        for life in range(KILLS + 1):
            asked, said, killed = lived(process, tmp_path, chance if life < KILLS else None)
            questions += asked
            with closing(Chats(tmp_path / "chats.db")) as chats:
                assert chats._rows("PRAGMA integrity_check")[0][0] == "ok"
                path = chats.path(chats.conversations()[0].id)
                texts = {message.id: message.text for message in path}
                waits = [item["text"] for item in chats.waiting()]
            for number, length, moment in said:
                assert killed - moment < LOST_SECONDS or len(texts[number]) >= length
            assert all(texts[number] == text for number, text in kept.items())
            stored = [message.text for message in path if message.role == "user"] + waits
            assert len(stored) >= len(questions) - 2 and stored == questions[:len(stored)]
            questions = stored  # it may have been killed in the middle of asking
            assert all(message.status != "running" for message in path)
            interrupted += path[-1].status == "interrupted"
            kept = texts
    assert interrupted > KILLS // 2  # they were killed in the middle
    assert path[-1].status in ("done", "length") and path[-1].text and not waits


if __name__ == "__main__":
    nursery()
