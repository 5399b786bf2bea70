#!/usr/bin/env bash
# Installs the Debian packages that the report's tests need, where they are missing: a browser, and a font for it.
set -euo pipefail

packages=(chromium fonts-dejavu-core)
if command -v chromium >/dev/null; then
    exit 0
fi
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "Missing: chromium. The report's tests in a browser need the packages ${packages[*]} (Debian's names)." >&2
    echo "Install them as root, or run the other tests alone: pytest --ignore=tests/report/test_browser.py." >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends "${packages[@]}"
