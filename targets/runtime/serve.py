"""`serve BUNDLE`: HTTP with FastAPI and uvicorn. POST /predict, GET /health, GET /manifest.

    curl --data-binary @images.npy http://127.0.0.1:8000/predict
    {"classes": [3], "labels": ["three"], "margins": [4.1]}

and, where the bundle holds a detector, "scores": [0.02], "flags": [false]: a flagged answer is not to be trusted.

Bodies: a `.npy` file, a PNG or JPEG of the network's own size, or raw float32 or uint8 (`X-Dtype`, `X-Shape`).
Bad input is answered 4xx with {"error": ...}: 413 too large, 422 anything else that cannot be predicted.
"""

import argparse
import socket
import sys
from typing import TYPE_CHECKING, Any

from targets.runtime.body import decode
from targets.runtime.errors import BadImages, BadOption, MissingRuntime
from targets.runtime.predictor import Predictor, decide, open_bundle

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_BYTES = 64 << 20
# Requests beyond this many at once are answered 503 by the server, so that a burst cannot take all the memory.
MAX_REQUESTS = 32


def run(args: argparse.Namespace) -> int:
    """Serves until interrupted.

    A bundle that is not as recorded, and an address that cannot be listened on, raise `BundleError` (status 2) first.
    """
    predictor = open_bundle(args.bundle, verify=True, threads=args.threads, runtime=args.runtime)
    app = make_app(predictor)
    import uvicorn

    listener = _listen(args.host, args.port)
    bundle = predictor.bundle
    sys.stderr.write(f"serving {bundle.name} for {bundle.target}: {bundle.model} on {predictor.provider}\n")
    for metric in bundle.still_owed():
        sys.stderr.write(f"limit owed on the device: {metric}; run `finish` there\n")
    if predictor.provider not in (bundle.provider, "TensorRT"):
        sys.stderr.write(f"{bundle.provider} does not work here; the processor computes\n")
    # The address in full: the server itself names none that it has not bound. Who connects now waits until it answers.
    host = f"[{args.host}]" if ":" in args.host else args.host
    sys.stderr.write(f"running on http://{host}:{listener.getsockname()[1]} (Ctrl-C stops)\n")
    sys.stderr.flush()
    config = uvicorn.Config(app, log_level="info", access_log=False, limit_concurrency=MAX_REQUESTS)
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    return 0 if server.started else 2


def _listen(host: str, number: int) -> socket.socket:
    """Bound here, since the server would answer a port that is taken with a log of its own and exit status 1."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, number), family=family, backlog=2048)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        raise BadOption(f"cannot listen on {host} port {number}: {why}; choose others: --host, --port") from error


def make_app(predictor: Predictor, max_bytes: int = MAX_BYTES) -> "FastAPI":
    """The application around an open predictor. Raises `MissingRuntime` without FastAPI."""
    try:
        import uvicorn  # noqa: F401  without it the application could be made and not served
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse
        from starlette.concurrency import run_in_threadpool
    except ImportError as error:
        raise MissingRuntime(f'serve needs {error.name}; `pip install "temper-edge[serve]"`') from error

    import threading

    bundle = predictor.bundle
    # One engine call at a time: its threads are already `threads`, and a TensorRT context is not thread-safe.
    turn = threading.Lock()
    # No interactive pages: they load scripts from elsewhere, and nothing here reaches for the network.
    app = FastAPI(title=bundle.name, docs_url=None, redoc_url=None, openapi_url=None)

    def answer(body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        images = decode(body, headers, bundle.shape)
        with turn:
            found = predictor.answer(images)
        classes, margins = decide(found.logits)
        told: dict[str, Any] = {
            "classes": classes.tolist(),
            "labels": [bundle.labels[i] for i in classes],
            "margins": [round(float(m), 6) for m in margins],
        }
        if found.scores is not None and found.flags is not None:
            told |= {"scores": [round(float(s), 6) for s in found.scores], "flags": found.flags.tolist()}
        return told

    async def predict(request: Request) -> JSONResponse:
        length = request.headers.get("content-length", "")
        body = bytearray()
        if length.isdecimal() and int(length) > max_bytes:
            return too_large()
        async for piece in request.stream():
            body += piece
            if len(body) > max_bytes:
                return too_large()
        try:
            return JSONResponse(await run_in_threadpool(answer, bytes(body), dict(request.headers)))
        except BadImages as error:
            return JSONResponse({"error": str(error)}, status_code=422)

    def too_large() -> JSONResponse:
        return JSONResponse({"error": f"body: at most {max_bytes} bytes are taken at once"}, status_code=413)

    def health() -> JSONResponse:
        return JSONResponse(
            {
                "status": "ok",
                "name": bundle.name,
                "target": bundle.target,
                "provider": predictor.provider,
                "owed": list(bundle.still_owed()),
            }
        )

    def manifest() -> JSONResponse:
        return JSONResponse(dict(bundle.manifest))

    app.add_api_route("/predict", predict, methods=["POST"])
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/manifest", manifest, methods=["GET"])
    return app
