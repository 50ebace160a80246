package libvirt

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// element is a node of an XML tree that keeps all it does not know: prefixes,
// namespaces, the order of attributes, comments, text. A domain's XML is edited
// in this form and never passed through structs that know only part of it.
type element struct {
	name     string // with its prefix: "qemu:arg"
	attrs    []attr
	children []any // *element, text, or comment
}

type (
	attr    struct{ name, value string }
	text    string
	comment string
)

// Bounds of what is read: a domain's XML is some tens of KiB.
const (
	maxXML   = 8 << 20
	maxDepth = 100
)

// parseTree reads a document and returns its root. What stands before and
// after the root is dropped.
func parseTree(data []byte) (*element, error) {
	if len(data) > maxXML {
		return nil, errors.New("XML document is too long")
	}
	d := xml.NewDecoder(bytes.NewReader(data))
	var open []*element
	var root *element
	for {
		// Raw: prefixes are kept as they stand. That start and end match is
		// checked here.
		tok, err := d.RawToken()
		if err == io.EOF {
			break
		} else if err != nil {
			return nil, fmt.Errorf("parse XML: %w", err)
		}
		var top *element
		if len(open) > 0 {
			top = open[len(open)-1]
		}
		switch t := tok.(type) {
		case xml.StartElement:
			e := &element{name: rawName(t.Name)}
			for _, a := range t.Attr {
				e.attrs = append(e.attrs, attr{rawName(a.Name), a.Value})
			}
			switch {
			case top != nil:
				top.children = append(top.children, e)
			case root != nil:
				return nil, errors.New("parse XML: two root elements")
			default:
				root = e
			}
			if open = append(open, e); len(open) > maxDepth {
				return nil, errors.New("parse XML: nested too deep")
			}
		case xml.EndElement:
			if top == nil || top.name != rawName(t.Name) {
				return nil, fmt.Errorf("parse XML: </%s> ends nothing", rawName(t.Name))
			}
			open = open[:len(open)-1]
		case xml.CharData:
			if top != nil {
				top.children = append(top.children, text(t))
			}
		case xml.Comment:
			if top != nil {
				top.children = append(top.children, comment(t))
			}
		}
	}
	if root == nil || len(open) > 0 {
		return nil, errors.New("parse XML: document ends early")
	}
	return root, nil
}

func rawName(n xml.Name) string {
	if n.Space == "" {
		return n.Local
	}
	return n.Space + ":" + n.Local
}

// String is the tree as XML.
func (e *element) String() string {
	var b strings.Builder
	e.write(&b)
	return b.String()
}

func (e *element) write(b *strings.Builder) {
	b.WriteString("<" + e.name)
	for _, a := range e.attrs {
		b.WriteString(" " + a.name + `="`)
		attrEscaper.WriteString(b, a.value)
		b.WriteString(`"`)
	}
	if len(e.children) == 0 {
		b.WriteString("/>")
		return
	}
	b.WriteString(">")
	for _, c := range e.children {
		switch c := c.(type) {
		case *element:
			c.write(b)
		case text:
			textEscaper.WriteString(b, string(c))
		case comment:
			b.WriteString("<!--" + string(c) + "-->")
		}
	}
	b.WriteString("</" + e.name + ">")
}

// A reader of XML turns line ends of an attribute into spaces unless they are
// written as references.
var (
	textEscaper = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", "\r", "&#xD;")
	attrEscaper = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", "\r", "&#xD;", `"`, "&quot;", "\n", "&#xA;", "\t", "&#x9;")
)

// pretty lays the tree out anew, two spaces a level, so that a document that
// was edited reads like one that was written. Text between elements that is
// not blank stays where it is, and so does its parent's layout.
func (e *element) pretty() { e.layOut("\n") }

func (e *element) layOut(indent string) {
	mixed, nested := false, false
	for _, c := range e.children {
		switch c := c.(type) {
		case text:
			mixed = mixed || strings.TrimSpace(string(c)) != ""
		default:
			nested = true
		}
	}
	if mixed {
		return
	}
	if !nested {
		if strings.TrimSpace(e.text()) == "" {
			e.children = nil
		}
		return
	}
	var out []any
	for _, c := range e.children {
		if _, blank := c.(text); blank {
			continue
		}
		if c, ok := c.(*element); ok {
			c.layOut(indent + "  ")
		}
		out = append(out, text(indent+"  "), c)
	}
	e.children = append(out, text(indent))
}

// attr gives an attribute's value, "" if there is none or no element.
func (e *element) attr(name string) string {
	if e == nil {
		return ""
	}
	for _, a := range e.attrs {
		if a.name == name {
			return a.value
		}
	}
	return ""
}

// set gives an attribute a value; "" removes it.
func (e *element) set(name, value string) {
	i := slices.IndexFunc(e.attrs, func(a attr) bool { return a.name == name })
	switch {
	case value == "" && i >= 0:
		e.attrs = slices.Delete(e.attrs, i, i+1)
	case value == "":
	case i >= 0:
		e.attrs[i].value = value
	default:
		e.attrs = append(e.attrs, attr{name, value})
	}
}

// all gives the children of that name; none for nil.
func (e *element) all(name string) []*element {
	var out []*element
	if e == nil {
		return nil
	}
	for _, c := range e.children {
		if c, ok := c.(*element); ok && c.name == name {
			out = append(out, c)
		}
	}
	return out
}

// at follows a path of names, taking the first child each time; nil if there
// is none. Looking into a nil element is allowed.
func (e *element) at(path ...string) *element {
	for _, name := range path {
		cs := e.all(name)
		if len(cs) == 0 {
			return nil
		}
		e = cs[0]
	}
	return e
}

// need is at for one name, making the child where it is missing.
func (e *element) need(name string) *element {
	if c := e.at(name); c != nil {
		return c
	}
	c := &element{name: name}
	e.children = append(e.children, c)
	return c
}

// elements gives all children that are elements; none for nil.
func (e *element) elements() []*element {
	var out []*element
	if e == nil {
		return nil
	}
	for _, c := range e.children {
		if c, ok := c.(*element); ok {
			out = append(out, c)
		}
	}
	return out
}

// drop removes the children for which f is true.
func (e *element) drop(f func(*element) bool) {
	e.children = slices.DeleteFunc(e.children, func(c any) bool {
		el, ok := c.(*element)
		return ok && f(el)
	})
}

// dropAll removes the children of these names.
func (e *element) dropAll(names ...string) {
	e.drop(func(c *element) bool { return slices.Contains(names, c.name) })
}

// text gives the text directly inside, trimmed; "" for nil.
func (e *element) text() string {
	if e == nil {
		return ""
	}
	var b strings.Builder
	for _, c := range e.children {
		if t, ok := c.(text); ok {
			b.WriteString(string(t))
		}
	}
	return strings.TrimSpace(b.String())
}

// setText replaces all that is inside by text.
func (e *element) setText(s string) { e.children = []any{text(s)} }

// add appends children.
func (e *element) add(cs ...*element) {
	for _, c := range cs {
		e.children = append(e.children, c)
	}
}

// clone copies the tree.
func (e *element) clone() *element {
	out := &element{name: e.name, attrs: slices.Clone(e.attrs)}
	for _, c := range e.children {
		if c, ok := c.(*element); ok {
			out.children = append(out.children, c.clone())
			continue
		}
		out.children = append(out.children, c)
	}
	return out
}

// walk calls f for the element and all below it.
func (e *element) walk(f func(*element)) {
	f(e)
	for _, c := range e.elements() {
		c.walk(f)
	}
}

// el makes an element with attributes given in pairs; those with an empty
// value are left out.
func el(name string, pairs ...string) *element {
	e := &element{name: name}
	for i := 0; i+1 < len(pairs); i += 2 {
		e.set(pairs[i], pairs[i+1])
	}
	return e
}
