"How Sphinx shows what tools/docs.py has written into build/docs: no notebook is run, nothing comes from the network"
import json
from pathlib import Path
from docutils import nodes
from latex2mathml.converter import convert

project = 'self_supervised_swav'
author = copyright = 'self_supervised_swav contributors'  # as in LICENSE
extensions = ['myst_nb', 'sphinx_copybutton']
root_doc = 'index'
exclude_patterns = ['extra']
html_extra_path = ['extra']
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4
myst_all_links_external = True  # the converter has written them as addresses
# a section of one notebook may start deeper than that of another
suppress_warnings = ['myst.header', 'config.cache']

smartquotes_action = 'qe'  # quotes and ellipses; two hyphens begin an option
html_theme = 'furo'
html_title = project
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it would fetch pages, which a browser does not do from files
html_theme_options = dict(navigation_with_keys=True)
pygments_style,pygments_dark_style = 'friendly','monokai'
copybutton_exclude = '.linenos, .gp, .go'

def add_description(app, page, template, context, doctree):
    "The line below a page's title is its description"
    line = json.loads((Path(app.srcdir)/'descriptions.json').read_text()).get(page)
    if not line: return
    text = line.replace('&', '&amp;').replace('"', '&quot;').replace('<', '&lt;')
    context['metatags'] = context.get('metatags', '') + f'\n<meta name="description" content="{text}">'

def mark_cells(app, doctree, page):
    "Classes for what must not be broken, and for columns that need room"
    for table in doctree.findall(nodes.tgroup):
        for column in zip(*table.findall(nodes.row)):
            lengths = [len(o.astext()) for o in column]
            for o,n in zip(column, lengths):
                if n<=16: o['classes'].append('short')
                if max(lengths)>40: o['classes'].append('sentences')

def visit_math(self, node):
    "Formulas as MathML, which browsers show without a script"
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode

def visit_math_block(self, node):
    "A formula on a line of its own"
    self.body.append('<div class="math">' + convert(node.astext(), display='block') + '</div>\n')
    raise nodes.SkipNode

def setup(app):
    app.add_html_math_renderer('mathml', (visit_math,None), (visit_math_block,None))
    app.connect('html-page-context', add_description)
    app.connect('doctree-resolved', mark_cells)
    app.config.html_math_renderer = 'mathml'
