"""Arrays to pictures; the only importer of matplotlib."""

import logging

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
