"""The report as one page that needs nothing but a browser."""

from __future__ import annotations

from kvbench.report.html.page import Content, file_hashes, page, write_page

__all__ = ["Content", "file_hashes", "page", "write_page"]
