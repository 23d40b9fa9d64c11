"""CSS of the HTML report."""

STYLE = """
:root { --ink: #1d2430; --soft: #5d6878; --line: #dde2ea; --paper: #ffffff; --ground: #f5f6f9;
        --good: #17804d; --bad: #c23934; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; color: var(--ink); background: var(--ground);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .4rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .8rem; }
h3 { font-size: .8rem; font-weight: 600; color: var(--soft); margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
.summary { color: var(--soft); margin: 0; max-width: 48rem; }
table { border-collapse: collapse; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
th, td { text-align: left; padding: .4rem .9rem; border-top: 1px solid var(--line); }
th { font-size: .8rem; color: var(--soft); border-top: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.ok-yes { color: var(--good); font-weight: 600; }
.ok-no { color: var(--bad); font-weight: 600; }
.plots, .cards { display: flex; flex-wrap: wrap; gap: 1rem; align-items: stretch; }
.plot { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; max-width: 100%; }
article { background: var(--paper); border: 1px solid var(--line); border-top: 3px solid var(--line);
          border-radius: 8px; padding: .7rem .8rem; max-width: 100%; width: min-content; min-width: 15rem; }
article.right { border-top-color: var(--good); }
article.wrong { border-top-color: var(--bad); }
article p { margin: 0 0 .15rem; font-size: .85rem; overflow-wrap: anywhere; }
.strip { display: flex; gap: 3px; overflow-x: auto; }
.strip img { height: 112px; border-radius: 4px; }
"""
