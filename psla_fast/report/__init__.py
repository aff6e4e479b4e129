"""Report: run folders -> one self-contained HTML page."""

from psla_fast.report.build import ReportOptions, build_report
from psla_fast.report.render import render_page

__all__ = ["ReportOptions", "build_report", "render_page"]
