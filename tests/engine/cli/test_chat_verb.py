"""`python -m engine chat` as a person uses it: a process, its two streams, its exit code, Ctrl+C."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from engine.__main__ import main


def start(repository, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "engine", "chat", *arguments], cwd=repository, text=True,
                            encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})


def test_json_is_one_document_and_nothing_else(demo_checkpoint, capsys):
    code = main(["chat", str(demo_checkpoint), "--level", "exact", "--device", "cpu", "--prompt", "Hello!",
                 "--temperature", "0", "--max-tokens", "5", "--json"])
    out = capsys.readouterr().out
    document = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and set(document) == {
        "answer", "thinking", "n_tokens", "tokens_per_second", "hit_rate", "far_bytes_per_token", "reason"}
    assert document["answer"] and 1 <= document["n_tokens"] <= 5 and document["tokens_per_second"] > 0
    assert (document["far_bytes_per_token"] == 0) == (document["hit_rate"] == 1)


def test_a_conversation_in_the_terminal(repository, demo_checkpoint):
    process = start(repository, str(demo_checkpoint), "--device", "cpu", "--temperature", "0", "--max-tokens", "20")
    out, err = process.communicate("Hi!\n\n/level\n/level exact\n/level none\n/help\n/new\n/x\nWhat is your name?\n",
                                   timeout=300)
    assert process.returncode == 0, err
    assert len([line for line in out.splitlines() if line.strip("> ")]) >= 2
    assert err.count("tokens/s") == 2 and err.count("MB/token") == 2
    assert "Level exact; there are" in err and "/new          begin" in err and "A new conversation." in err
    assert "/x is not known here" in err and "none" in err and "Traceback" not in err
    assert "it/s]" not in err and "%|" not in err  # no library's progress bars


def test_an_answer_in_a_file_is_utf_8_and_python_may_be_told_to_optimise(repository, demo_checkpoint):
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1252"}
    said = ("from engine.cli.chat.chat import _say; from engine.core import Event; from engine import begin_process; "
            "begin_process('engine'); _say(Event('answer', 'boat ⛵'), True); from transformers.utils import logging; "
            "logging.get_logger('transformers').warning('Install something.')")
    done = subprocess.run([sys.executable, "-c", said], cwd=repository, capture_output=True, env=variables)
    assert (done.stdout.decode("utf-8"), done.stderr) == ("boat ⛵", b"")
    done = subprocess.run([sys.executable, "-OO", "-m", "engine", "chat", str(demo_checkpoint), "--device", "cpu",
                           "--prompt", "Hi", "--max-tokens", "2"], cwd=repository, capture_output=True, env=variables)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["no-such-folder", "--prompt", "Hi"], "There is no folder"),
    (["DEMO", "--json"], "--prompt TEXT"),
    (["DEMO", "--prompt", "Hi", "--temperature", "-1"], "Temperature must be 0–10, not -1"),
    (["DEMO", "--prompt", "Hi", "--near-bytes", "much"], "'much' is not a size"),
    (["DEMO", "--prompt", "Hi", "--near-bytes", "1KiB"], "give at least"),
    (["DEMO", "--prompt", "Hi", "--context", "100000"], "at most 1,024 tokens"),
    (["DEMO", "--prompt", "one two three " * 700], "too many for the context of 1,024"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(demo_checkpoint, capsys, arguments, sentence):
    code = main(["chat", *(str(demo_checkpoint) if text == "DEMO" else text for text in arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 2 and out.strip() == "" and sentence in err.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_the_answer_and_not_the_program(repository, demo_checkpoint):
    process = start(repository, str(demo_checkpoint), "--device", "cpu", "--temperature", "3")
    process.stdin.write("Tell me a very long story about the sea.\n")
    process.stdin.flush()
    text = process.stdout.read(12)  # the answer has begun
    process.send_signal(signal.SIGINT)
    process.stdin.write("Hi!\n")
    process.stdin.flush()
    end = time.monotonic() + 240
    status = ""
    while status.count("tokens/s") < 2 and time.monotonic() < end:
        status += process.stderr.readline()
    process.stdin.close()
    assert process.wait(60) == 0 and text
    assert ", stopped]" in status and status.count("tokens/s") == 2
    process.stdout.close()
    process.stderr.close()
