"""Style sheet of the report: colours for light and dark, tables, tiles."""

CSS = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--fg:#1d2330;--muted:#626b7a;--line:#e3e5ea;
 --good:#1a7f4b;--bad:#c2303f;--warn-bg:#fff3d6;--warn-line:#e0a100;
 --c0:#2166b5;--c1:#d4690c;--c2:#1f8a5b;--c3:#8a4fb0;--c4:#c2303f;--c5:#7b8494}
@media(prefers-color-scheme:dark){:root{--bg:#14171c;--card:#1c2027;--fg:#e6e8ec;--muted:#9aa3b2;--line:#323843;
 --good:#4fc48a;--bad:#ff7582;--warn-bg:#3a2f12;--warn-line:#c99a1a;
 --c0:#6caaf0;--c1:#f2a052;--c2:#54c794;--c3:#c193e6;--c4:#ff7582;--c5:#9aa3b2}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
 "Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%;print-color-adjust:exact;
 -webkit-print-color-adjust:exact}
main{max-width:1120px;margin:0 auto;padding:1.2rem 1rem 3rem}
h1{font-size:1.7rem;margin:0;line-height:1.2;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.4rem 0 .3rem}
p{margin:.3rem 0 .8rem;max-width:75ch}
.muted,.note{color:var(--muted)}
.note{border-left:3px solid var(--line);padding-left:.7rem;font-size:.92rem}
.state{display:inline-block;padding:.05rem .6rem;border-radius:1rem;border:1px solid currentColor;
 font-size:.85rem;vertical-align:middle;margin-left:.5rem}
.state.good{color:var(--good)}.state.bad{color:var(--bad)}.state.open{color:var(--c1)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:.8rem;margin:1.2rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.card b{display:block;font-size:1.6rem;line-height:1.25;font-variant-numeric:tabular-nums}
.card span{font-size:.82rem;color:var(--muted);display:block}
.card .name{font-size:.88rem;color:var(--fg)}
.warn{background:var(--warn-bg);border-left:4px solid var(--warn-line);padding:.5rem .8rem;margin:.5rem 0;
 border-radius:.3rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:1.6rem 2rem;
 margin-top:.8rem}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;vertical-align:middle}
thead th{font-size:.85rem;font-weight:600;color:var(--muted);border-bottom:1px solid var(--line)}
.results td{border-bottom:1px solid var(--line)}
.results td.num{white-space:nowrap;min-width:9.5rem}
.results tr.strong td{font-weight:600}
.bar{display:block;height:.35rem;border-radius:.2rem;background:var(--c0);opacity:.85;min-width:1px}
tr:not(.strong) .bar{background:var(--c5)}
.gain{color:var(--good)}.loss{color:var(--bad)}
.tiles td,.tiles th{padding:.16rem;text-align:center;font-weight:400;font-size:.78rem;color:var(--muted);
 line-height:1.2;border:0}
.tile{display:block;position:relative;width:76px;background-size:100% 100%;overflow:hidden;border-radius:3px}
.tile,.tile img,.near img{image-rendering:pixelated}
.tile img{position:absolute;inset:0;width:100%;height:100%;display:block}
.near td{padding:.2rem .3rem;font-size:.75rem;color:var(--muted);line-height:1.25;text-align:center;
 vertical-align:top}
.near img{display:block;width:86px;height:auto;border:3px solid transparent;border-radius:5px;margin:auto}
.near .right img{border-color:var(--good)}.near .wrong img{border-color:var(--bad)}
.near .name{max-width:92px;overflow-wrap:anywhere}
.near td:first-child{padding-right:1.2rem}
.scale{display:inline-block;width:8rem;height:.7rem;border-radius:.2rem;vertical-align:middle;margin:0 .4rem}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--muted)}
.kv{width:100%;font-size:.88rem}
.kv td{padding:.12rem .9rem .12rem 0;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
.kv td:first-child{width:16rem;color:var(--muted)}
footer{margin-top:3rem;font-size:.82rem;color:var(--muted)}
@media(max-width:600px){.kv td:first-child{width:45%}.results td.num{min-width:6.5rem}.tile{width:60px}
 .near img{width:64px}h1{font-size:1.4rem}}
"""
