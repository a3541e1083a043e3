"""Sphinx configuration: sphinx-build -W docs results/docs (no network is used)."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import gsm_optax

project = "gsm_optax"
project_copyright = "the gsm_optax authors"
version = release = gsm_optax.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "py:obj"  # `name` is a link where that is the name of something here

autodoc_preserve_defaults = True  # importance=taylor_importance, not its address
autodoc_typehints = "none"  # the docstrings say it with shapes and dtypes
autodoc_class_signature = "separated"  # fields have their own lines
add_module_names = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"gsm_optax {release}"
html_static_path = ["style"]
html_css_files = ["style.css"]
html_show_sphinx = False
html_show_copyright = False


def setup(app):
    """Write equations as MathML, which browsers show without a script or a network."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


html_math_renderer = "mathml"


def _inline(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator, node):
    mathml = tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="math">{mathml}</div>')
    raise nodes.SkipNode
