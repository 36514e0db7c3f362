"""What an installed hhdeploy must do away from its checkout; run by an environment's own Python.

    python smoke.py build PLACE     train, export, verify, predict: needs the extras export and cpu
    python smoke.py edge PLACE      verify, predict, add an adapter, serve: needs cpu and serve

``edge`` takes the bundle that ``build`` left in PLACE. Standard library, and what hhdeploy brings.
"""

from __future__ import annotations

import base64
import json
import random
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import hhdeploy

COMMAND = Path(sys.executable).with_name("hhdeploy")
MODEL = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
PATIENCE_S = 120


def run(*arguments: object) -> str:
    """A command that must succeed; gives what it printed."""
    command = [str(COMMAND), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def draw(folder: Path, count: int, seed: int) -> None:
    """Pictures of seeded noise, not square."""
    from PIL import Image

    noise = random.Random(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        Image.frombytes("RGB", (37, 41), noise.randbytes(37 * 41 * 3)).save(folder / f"{index}.png")


def build(place: Path) -> None:
    """From pictures to a verified bundle, as on a build machine."""
    import timm
    from safetensors.torch import save_file

    for seed, label in enumerate(("daisy", "rose")):
        draw(place / "flowers" / label, 8, seed)
    weights = place / "weights.safetensors"
    model = timm.create_model(MODEL, num_classes=3, **ARGS)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, weights)
    known = ("--model", MODEL, "--model-args", json.dumps(ARGS), "--checkpoint", weights)
    adapter, tasks = place / "adapters" / "flowers", place / "tasks"
    run("train", *known, "--data", place / "flowers", "--epochs", 1, adapter)
    # A float16 graph is verified by a twin, which takes onnx: it stays on the build machine.
    run(
        "export", "--fold", "--precision", "float16", *known, "--adapter", adapter, place / "folded"
    )
    run("export", *known, "--adapter", adapter, tasks)
    run("verify", tasks)
    run("verify", place / "folded")
    answer_of(run("predict", tasks, place / "flowers" / "rose" / "0.png", "--json"))


def answer_of(document: str) -> None:
    """A document of `predict` has one of the classes in it."""
    if not {"daisy", "rose"} & set(re.findall(r'"(\w+)"', document)):
        raise SystemExit(f"no answer in: {document}")


def edge(place: Path) -> None:
    """A bundle from elsewhere: it verifies, answers, takes an adapter and is served."""
    tasks = place / "tasks"
    run("doctor")
    run("verify", tasks)
    run("adapter", "add", tasks, f"more={place / 'adapters' / 'flowers'}")
    picture = place / "flowers" / "daisy" / "1.png"
    answer_of(run("predict", tasks, picture, "--adapter", "more", "--json"))
    serve(tasks, picture)


def serve(tasks: Path, picture: Path) -> None:
    """The server starts, answers with a class, and ends when it is told."""
    command = [COMMAND, "serve", tasks, "--http-port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            address = re.search(r"http://\S+?:\d+", line)
            if address is None:
                raise SystemExit(f"the server said: {line!r}")
            data = base64.b64encode(picture.read_bytes()).decode()
            pictures = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [data]}
            body = json.dumps({"inputs": [pictures], "outputs": [{"name": "labels"}]}).encode()
            url = f"{address[0]}/v2/models/more/infer"
            with urllib.request.urlopen(url, body, timeout=PATIENCE_S) as response:
                answer_of(response.read().decode())
        finally:
            server.send_signal(signal.SIGTERM)
        if code := server.wait(PATIENCE_S):
            raise SystemExit(f"the server ended with {code}")


def main(part: str, place: str) -> None:
    """Run one part; ends with an error's text where something is wrong."""
    found = Path(hhdeploy.__file__).resolve()
    if not found.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"hhdeploy is not the installed one: {found}")
    {"build": build, "edge": edge}[part](Path(place))


if __name__ == "__main__":
    main(*sys.argv[1:])
