"""Pages with charts: markup and style, numbers as text, and figures in inline SVG."""
