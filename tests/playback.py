"""Play a video in a real browser and read back what it shows: headless Chromium, a page of ours, a server on this machine."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
_PATIENCE = 60.0  # s until a page must have answered
_PAGE = """<!doctype html><meta charset="utf-8"><video id="video" autoplay src="NAME"></video><script>
const video = document.getElementById("video");
const tell = (state) => fetch("/seen", {method: "POST", body: JSON.stringify({
  state, duration: video.duration || 0, width: video.videoWidth, height: video.videoHeight,
  tracks: state === "ended" ? kinds : [], audio_bytes: video.webkitAudioDecodedByteCount, video_bytes: video.webkitVideoDecodedByteCount,
  at: video.currentTime, reason: video.error ? video.error.message : "",
})});
let kinds = [];
video.onplaying = () => { kinds = video.captureStream().getTracks().map((track) => track.kind).sort(); };
video.onended = () => tell("ended");
video.onerror = () => tell("error");
</script>"""


@dataclass(frozen=True)
class Played:
    """What the browser says of a video after playing it to its end."""

    state: str  # ended or error
    duration: float  # s
    width: int  # px
    height: int  # px
    tracks: list[str]  # kinds, sorted
    audio_bytes: int  # decoded
    video_bytes: int  # decoded
    at: float  # s
    reason: str  # of an error


def play(video: Path) -> Played:
    """Play a file in Chromium to its end. Raises queue.Empty if the page never answers."""
    answers: queue.Queue[bytes] = queue.Queue()
    with TemporaryDirectory() as profile, _served(video, answers) as url, _browser(url, Path(profile)):
        return Played(**json.loads(answers.get(timeout=_PATIENCE)))


@contextmanager
def _served(video: Path, answers: queue.Queue[bytes]) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._answer(_PAGE.replace("NAME", video.name).encode())
            else:
                super().do_GET()

        def do_POST(self) -> None:
            answers.put(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(b"")

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(video.parent))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _browser(url: str, profile: Path) -> Iterator[None]:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--mute-audio", "--autoplay-policy=no-user-gesture-required"]
    command = [CHROMIUM, *options, "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-port=0", url]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
