"""Pages in headless Chromium: opened wide or narrow, light or dark, and watched for what they should never do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LAUNCH = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll(".strip span[class]:not(.u)")].map((token) => {
    const style = getComputedStyle(token);
    const [low, high] = [style.color, style.backgroundColor].map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""


@contextmanager
def visits(browser, path: Path, ready: Callable[[str], str]) -> Iterator[Callable]:
    """A function that opens the page and waits for the selector `ready(scheme)`.

    In the end nothing was logged, asked or requested, but what the test itself cleared (`.noise`).
    """
    opened, noise = [], []

    def go(width: int = 1280, scheme: str = "light", script: bool = True, height: int = 900, part: str = ""):
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, color_scheme=scheme, java_script_enabled=script)
        tab = context.new_page()
        tab.add_init_script(WATCH)
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("dialog", lambda dialog: noise.append(dialog.message))
        wanted = path.as_uri() + part
        tab.on("request", lambda request: None if request.url in (wanted, path.as_uri()) else noise.append(request.url))
        tab.goto(wanted)
        if script:
            tab.wait_for_selector(ready(scheme))
        opened.append(context)
        return tab

    go.noise = noise
    yield go
    for context in opened:
        context.close()
    assert noise == []
