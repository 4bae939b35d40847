"""`hf-eagle3 serve`: Transformers' server, with a drafter."""

import json
import re
import socket
import threading
import time
import urllib.request
from contextlib import contextmanager

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


@contextmanager
def serving(folders, **options):
    """The host's server with a drafter, in a thread; where it answers, and the name of its model."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    from transformers.cli.serve import Serve

    served, drafter = (str(folders / name) for name in ("target", "drafter"))
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    with drafting(drafter):
        running = Serve(served, port=port, device="cpu", dtype="float32", non_blocking=True, **options)
        while not running.server.started:
            time.sleep(0.02)
        try:
            yield f"http://localhost:{port}", served
        finally:
            running.kill_server()


@pytest.mark.parametrize("batches", [False, True], ids=["alone", "batches"])
def test_answers_are_those_without_a_drafter(folders, batches, target, tokenizer):
    with serving(folders, continuous_batching=batches) as (place, served):
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
                f"{place}/v1/chat/completions",
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
        with urllib.request.urlopen(f"{place}/health") as answer:
            assert json.load(answer) == {"status": "ok"}
        with urllib.request.urlopen(f"{place}/metrics") as answer:
            page = answer.read().decode()
    assert re.search(rf"^hf_eagle3_manager_running.* {int(batches)}$", page, re.MULTILINE)
    assert ('outcome="finished"} 4' in page) == batches
    ids = tokenizer("abcab", return_tensors="pt")["input_ids"]
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert answers[0] == tokenizer.decode(plain, skip_special_tokens=True)
    assert answers[1] == answers[2] != answers[3]


@pytest.mark.parametrize("batches", [False, True], ids=["alone", "batches"])
def test_a_client_of_openai_streams_stops_and_hears_of_mistakes(folders, batches, target, tokenizer):
    ids = tokenizer("abcab", return_tensors="pt")["input_ids"]
    plain = target.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(plain, skip_special_tokens=True)
    with serving(folders, continuous_batching=batches) as (place, served):
        import openai

        client = openai.OpenAI(base_url=f"{place}/v1", api_key="none")
        asked = {
            "model": served,
            "messages": [{"role": "user", "content": "abcab"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == text
        assert whole.usage.completion_tokens == 12
        chunks = list(client.chat.completions.create(**asked, stream=True))
        said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(said).rstrip("\ufffd") == text.rstrip("\ufffd")  # half a letter at the end is not streamed
        assert len([part for part in said if part]) > 1
        with client.chat.completions.create(**asked, stream=True) as stream:
            next(iter(stream))  # and then the client goes away
        completion = client.completions.create(model=served, prompt="abcab", max_tokens=12, temperature=0)
        assert completion.choices[0].text == text
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**asked, logit_bias="no such thing")
        assert client.chat.completions.create(**asked).choices[0].message.content == text
