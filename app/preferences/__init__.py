"""The settings page: what is set of the whole program, one section a module.

A section NAME is a module here with `routes(router, parts)`, which answers below /api/preferences/NAME, and a script
assets/ui/preferences/NAME.js of the same name, which draws it. To add one: write both, add the module to SECTIONS below
and the name to SECTIONS in assets/ui/preferences/page.js (that order is the page's), its words to app/strings.py
(`preferences_NAME` is the heading). What is kept goes through `parts.chats.preference` and `set_preference`.
"""
from __future__ import annotations

from fastapi import APIRouter

from app.preferences import about, diagnostics, downloads, folders, habits, network, programs, server, titles

SECTIONS = (folders, downloads, titles, habits, programs, network, server, diagnostics, about)


def routes(router: APIRouter, parts) -> None:
    """Every section's. `parts` are the program's, as in app/server.py."""
    for section in SECTIONS:
        section.routes(router, parts)
