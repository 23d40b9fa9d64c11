"""Result rows, loss curves and sample pictures in, one HTML file out. Layout is `page.py`, CSS is `style.py`."""
