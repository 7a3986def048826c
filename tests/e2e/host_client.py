"""Asks servers that only this network namespace reaches; what to ask comes as JSON on standard input."""

import json
import sys
import time
import urllib.error
import urllib.request


def wait_ready(url: str, seconds: float) -> None:
    """Waits until a server is healthy; the proxy is once its engines are."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                content = answer.read()
            if not content or json.loads(content).get("status") == "ok":
                return
        except (OSError, ValueError):
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"{url} was not ready within {seconds} s")
        time.sleep(0.5)


def ask(url: str, model: str, prompt: list[int]) -> dict[str, str]:
    """Returns a completion's text and the proxy's route."""
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=180) as answer:
        text = json.load(answer)["choices"][0]["text"]
        return {"text": text, "route": answer.headers.get("x-kvlink-route", "")}


wanted = json.load(sys.stdin)
for url in wanted["urls"]:
    wait_ready(url, wanted["ready"])
print(json.dumps([[ask(url, wanted["model"], prompt) for prompt in wanted["prompts"]] for url in wanted["urls"]]))
