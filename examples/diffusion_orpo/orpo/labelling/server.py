"""The page's server: one annotator, on this machine only.

It uses Starlette and uvicorn, not Gradio: the page is keys and two large images, for which Gradio's components would only
be in the way, and these two with their requirements are a hundredth of its size.

A request must carry the token, which is in the printed address and then in a cookie, as in Jupyter; and must be addressed to
this machine's name, which no other site's page can do, even if that site's name leads here (DNS rebinding).
"""

import hmac
import io
import secrets
import signal
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from .questions import Question
from .session import Session


HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]
PAGE = Path(__file__).parent / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self';"
    " connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def open_socket(port: int) -> socket.socket:
    """Listens on the loopback interface.

    Args:
        port: 0 for any free one.

    Raises:
        ValueError: the port is in use, or this user may not have it.
    """
    listener = socket.socket()
    listener.setsockopt(
        socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
    )  # otherwise a restarted server would wait for a minute
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ValueError(
            f"--port={port} can't be opened: {error.strerror}. Choose another one, or 0 for any free one."
        ) from error
    return listener


def serve(session: Session, listener: socket.socket, token: str) -> None:
    """Serves the page until the process is told to end (Ctrl-C, SIGTERM)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn calls it when it has ended
    config = uvicorn.Config(make_app(session, listener.getsockname()[1], token), log_level="warning")
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass


def new_token() -> str:
    return secrets.token_urlsafe(24)


def make_app(session: Session, port: int, token: str) -> Starlette:
    """The page, its images and its requests."""
    page = Page(session, f"label-preferences-{port}", token)
    routes = [
        Route("/", page.show),
        *(Route(f"/{name}", partial(_static, name)) for name in ("page.js", "page.css")),
        Route("/state", page.state),
        Route("/image/{question:str}/{place:int}", page.image),
        Route("/answer", page.answer, methods=["POST"]),
        Route("/skip", page.skip, methods=["POST"]),
        Route("/undo", page.undo, methods=["POST"]),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False), Middleware(Headers)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _explain})


@dataclass(frozen=True)
class Page:
    """Answers the requests of one annotator's page.

    Requests that change something are handled one after the other: they never yield to the event loop between reading the
    session and writing the vote.

    Attributes:
        session: of the annotator.
        cookie: its name has the port, since a browser has one set of cookies for all ports of a machine.
        token: that requests must carry.
    """

    session: Session
    cookie: str
    token: str

    def show(self, request: Request) -> Response:
        if not self._is_allowed(request):
            raise HTTPException(403, "Open the address that label_preferences.py printed: it holds a token.")
        if "token" in request.query_params:
            response = RedirectResponse("/", 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return response
        return FileResponse(PAGE / "page.html")

    def image(self, request: Request) -> Response:
        self._require(request)
        question = self.session.question(request.path_params["question"])
        place = request.path_params["place"]
        if question is None or place >= len(question.images):
            raise HTTPException(404, "There is no such image.")
        try:
            content = self.session.read(question, place)
            with Image.open(io.BytesIO(content)) as opened:
                media_type = opened.get_format_mimetype()
        except (OSError, ValueError) as error:
            raise HTTPException(404, f"The image can't be shown: {error}") from error
        return Response(content, media_type=media_type)

    def state(self, request: Request) -> Response:
        self._require(request)
        return JSONResponse(_state(self.session))

    async def answer(self, request: Request) -> Response:
        given = await self._json(request)
        try:
            taken = self.session.answer(
                given["question"], given["choice"], given.get("best"), given.get("worst"), given["seconds"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise HTTPException(400, f"Not an answer: {error}") from error
        except OSError as error:
            raise HTTPException(507, f"The vote could not be written: {error}") from error
        return JSONResponse(_state(self.session) | {"taken": taken})

    async def skip(self, request: Request) -> Response:
        given = await self._json(request)
        taken = self.session.skip(given.get("question"))
        return JSONResponse(_state(self.session) | {"taken": taken})

    async def undo(self, request: Request) -> Response:
        await self._json(request)
        try:
            taken = self.session.undo()
        except OSError as error:
            raise HTTPException(507, f"The vote could not be taken back: {error}") from error
        return JSONResponse(_state(self.session) | {"taken": taken})

    def _is_allowed(self, request: Request) -> bool:
        given = request.query_params.get("token") or request.cookies.get(self.cookie) or ""
        return hmac.compare_digest(given.encode(), self.token.encode())

    def _require(self, request: Request) -> None:
        if not self._is_allowed(request):
            raise HTTPException(403, "The server was restarted: open the address that it printed.")

    async def _json(self, request: Request) -> dict:
        """The body of a request that changes something.

        Another site's page can't send its content type without this server's permission.
        """
        self._require(request)
        if request.headers.get("content-type") != "application/json":
            raise HTTPException(415, "Send JSON.")
        try:
            given = await request.json()
        except ValueError as error:
            raise HTTPException(400, f"Not JSON: {error}") from error
        if not isinstance(given, dict):
            raise HTTPException(400, "Not a JSON object.")
        return given


def _static(name: str, request: Request) -> Response:
    return FileResponse(PAGE / name)


class Headers:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, send_with_headers)


async def _explain(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code)


def _state(session: Session) -> dict:
    """What the page shows; names of files stay here."""
    upcoming = session.upcoming()
    return {
        "annotator": session.annotator,
        "folder": session.folder.resolve().name,
        "export": f"python label_preferences.py --images_dir={session.folder} --export=my_pairs",
        "question": _question(session.asked),
        "upcoming": _question(upcoming),
        "progress": session.progress,
    }


def _question(question: Question | None) -> dict | None:
    if question is None:
        return None
    images = [f"/image/{question.id}/{place}" for place in range(len(question.images))]
    return {"id": question.id, "prompt": question.prompt, "images": images}
