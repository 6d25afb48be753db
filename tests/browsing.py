"""How tests look at pages."""

import json


def open_page(browser, address: str, width: int, scheme: str) -> list[str]:
    """Open an address in a window of a width, in a light or dark scheme; return the addresses it asked for."""
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")  # what was before
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)
    return requests_of(browser)


def requests_of(browser) -> list[str]:
    """Return the addresses asked for since the last look."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
