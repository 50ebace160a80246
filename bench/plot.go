//go:build linux

package main

import (
	"bytes"
	"fmt"
	"html"
	"strings"
)

// The plot, in pixels.
const (
	plotWidth = 1000
	plotLabel = 505 // where labels end
	plotBar   = 515 // where bars begin
	plotAim   = 200 // length of a bar that just meets its aim
	plotMost  = 320 // of the longest bar
	plotLine  = 20  // height of a row
)

// style serves pages of either colour.
const style = `<style>
text { font: 12px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; }
.page { fill: #ffffff; }
.met { fill: #2f7fd0; }
.missed { fill: #d9692b; }
.aim { stroke: #1f2328; stroke-width: 1.5; stroke-dasharray: 4 3; }
@media (prefers-color-scheme: dark) {
	text { fill: #e6edf3; }
	.page { fill: #0d1117; }
	.aim { stroke: #e6edf3; }
}
</style>
`

// plotFile is the plot's name beside the report.
func plotFile(report string) string { return strings.TrimSuffix(report, ".md") + ".svg" }

// plot draws each figure that has an aim as a part of it, in SVG.
func (b *bench) plot() []byte {
	var s bytes.Buffer
	y := 44
	text := func(x, y int, class, anchor, text string) {
		fmt.Fprintf(&s, "<text x=\"%d\" y=\"%d\" class=\"%s\" text-anchor=\"%s\">%s</text>\n", x, y, class, anchor, html.EscapeString(text))
	}
	text(16, 22, "", "start", "A bar is the figure as a part of its aim, or the aim as a part of the figure where that should be large: it should end before the line.")
	for _, sec := range sections {
		begun := false
		for _, r := range sec.rows {
			v, ok := b.judged(r)
			part := v / r.most
			if r.least > 0 {
				part = r.least / v
			}
			if !ok || r.aim() == "" {
				continue
			}
			if !begun {
				y += plotLine + 6
				text(16, y-6, "title", "start", sec.title)
				begun = true
			}
			class, value := "met", number(v)
			if r.of == "" {
				value += " " + r.units()
			}
			if !r.met(v) {
				class = "missed"
			}
			length := max(1, min(int(part*plotAim), plotMost))
			text(plotLabel, y+14, "", "end", strings.ReplaceAll(r.what, "`", ""))
			fmt.Fprintf(&s, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" rx=\"2\" class=\"%s\"/>\n", plotBar, y+3, length, plotLine-6, class)
			if int(part*plotAim) > plotMost { // it goes on
				fmt.Fprintf(&s, "<path d=\"M%d %d l8 %d l-8 %d z\" class=\"%s\"/>\n", plotBar+plotMost-1, y+3, plotLine/2-3, plotLine/2-3, class)
				length += 8
			}
			text(plotBar+max(length, plotAim)+8, y+14, "", "start", value+", "+r.aim())
			y += plotLine
		}
	}
	head := fmt.Sprintf("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\">\n%s<rect width=\"100%%\" height=\"100%%\" class=\"page\"/>\n",
		plotWidth, y+16, plotWidth, y+16, style)
	fmt.Fprintf(&s, "<path d=\"M%d 52 V%d\" class=\"aim\"/>\n</svg>\n", plotBar+plotAim, y+6)
	return append([]byte(head), s.Bytes()...)
}
