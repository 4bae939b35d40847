"""`hf-eagle3 serve`: Transformers' server, with a drafter."""

import json
import re
import socket
import threading
import time
import urllib.request

import pytest
from transformers.cli.serving import server
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, CBGenerateManager

from hf_eagle3.cli import main
from hf_eagle3.host.attaching import find_attached
from hf_eagle3.host.serving import drafting


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "TARGET and DRAFTER are missing"),
        (["TARGET"], "DRAFTER is missing"),
        (["TARGET", "--drafter", "DRAFTER", "--compile"], "--compile: a drafter's target cannot be compiled"),
        (["TARGET", "--drafter", "/nowhere"], "--drafter /nowhere: there is no such folder"),
        (["TARGET", "--drafter", "DRAFTER", "--num-draft-tokens", "x"], "--num-draft-tokens"),
        (["TARGET", "--drafter", "DRAFTER", "--prot", "80"], "No such option '--prot'"),
        (["TARGET", "--drafter", "DRAFTER", "--port", "x"], "'x' is not a valid int"),
    ],
)
def test_mistakes_are_a_line(words, said, folders, capfd):
    names = dict(zip(("TARGET", "DRAFTER"), (str(folders / name) for name in ("target", "drafter")), strict=True))
    try:
        status = main(["serve", *(names.get(word, word) for word in words)])
    except SystemExit as error:
        status = error.code
    text = capfd.readouterr().err
    assert status == 2
    assert said in text
    assert "Traceback" not in text


def test_what_the_server_loads_drafts_while_it_is_entered(folders):
    served, drafter = (str(folders / name) for name in ("target", "drafter"))
    places = [(server, "build_server"), (ModelManager, "_load_model"), (BaseHandler, "_build_generation_config")]
    places += [(CBGenerateManager, name) for name in ("generate_streaming", "generate_non_streaming")]
    before = [vars(owner)[name] for owner, name in places]
    with drafting(drafter, num_assistant_tokens=2):
        loaded = ModelManager(device="cpu", dtype="float32")._load_model(ModelManager.process_model_name(served))
        assert find_attached(loaded, {}).settings == {"num_assistant_tokens": 2}
    assert [vars(owner)[name] for owner, name in places] == before


def test_a_foreign_model_as_a_drafter_is_refused(folders):
    served = str(folders / "target")
    with drafting(served), pytest.raises(ValueError, match="no EAGLE-3 drafter"):
        ModelManager(device="cpu", dtype="float32")._load_model(ModelManager.process_model_name(served))


@pytest.mark.parametrize("batches", [False, True], ids=["alone", "batches"])
def test_answers_are_those_without_a_drafter(folders, batches, target, tokenizer):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    from transformers.cli.serve import Serve

    served, drafter = (str(folders / name) for name in ("target", "drafter"))
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    with drafting(drafter):
        running = Serve(
            served, port=port, device="cpu", dtype="float32", continuous_batching=batches, non_blocking=True
        )
        while not running.server.started:
            time.sleep(0.02)
        try:
            sampled = {
                "generation_config": json.dumps({"do_sample": True, "max_new_tokens": 12}),
                "temperature": 300.0,
            }
            bodies = [{"temperature": 0.0}, *({**sampled, "seed": seed} for seed in (5, 5, 6))]
            answers = [None] * len(bodies)

            def ask(number):
                body = {"model": served, "messages": [{"role": "user", "content": "abcab"}], "max_tokens": 12}
                body |= {"stream": False, **bodies[number]}
                request = urllib.request.Request(
                    f"http://localhost:{port}/v1/chat/completions",
                    json.dumps(body).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request) as answer:
                    answers[number] = json.load(answer)["choices"][0]["message"]["content"]

            threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            with urllib.request.urlopen(f"http://localhost:{port}/health") as answer:
                assert json.load(answer) == {"status": "ok"}
            with urllib.request.urlopen(f"http://localhost:{port}/metrics") as answer:
                page = answer.read().decode()
        finally:
            running.kill_server()
    assert re.search(rf"^hf_eagle3_manager_running.* {int(batches)}$", page, re.MULTILINE)
    assert ('outcome="finished"} 4' in page) == batches
    ids = tokenizer("abcab", return_tensors="pt")["input_ids"]
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert answers[0] == tokenizer.decode(plain, skip_special_tokens=True)
    assert answers[1] == answers[2] != answers[3]
