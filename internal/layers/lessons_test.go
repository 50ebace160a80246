package layers

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every case of the table in docs/adr/0012-lessons-of-others.md names tests that
// exist, as `package: TestName`, or says that it waits for what is not built.
func TestLessons(t *testing.T) {
	const doc = "../../docs/adr/0012-lessons-of-others.md"
	b, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	there := tests(t)
	named := regexp.MustCompile("`([a-z0-9/]+): ((?:Test|Fuzz)\\w+)`")
	next := 1
	for line := range bytes.Lines(b) {
		for _, m := range named.FindAllSubmatch(line, -1) {
			if name := fmt.Sprintf("%s: %s", m[1], m[2]); !there[name] {
				t.Errorf("%s: there is no test %s", doc, name)
			}
		}
		cells := strings.Split(string(line), "|")
		var n int
		if len(cells) != 6 {
			continue
		} else if _, err := fmt.Sscan(cells[1], &n); err != nil {
			continue // the table's head
		}
		if n != next {
			t.Errorf("%s: case %d stands where %d should", doc, n, next)
		}
		next++
		if !named.MatchString(cells[4]) && !strings.Contains(cells[4], "not built yet") {
			t.Errorf("%s: case %d names no test", doc, n)
		}
	}
	if next != 26 {
		t.Errorf("%s: %d cases, not 25", doc, next-1)
	}
	for name := range there {
		if m := regexp.MustCompile(`: TestLesson(\d\d)`).FindStringSubmatch(name); m != nil && !bytes.Contains(b, []byte("`"+name+"`")) {
			t.Errorf("%s does not name %s", doc, name)
		}
	}
}

// tests lists the functions of tests of the module's own packages, as
// "package: TestName" with the package's path below internal.
func tests(t *testing.T) map[string]bool {
	names := map[string]bool{}
	each(t, "..", func(file string, f *ast.File) {
		if !strings.HasSuffix(file, "_test.go") {
			return
		}
		for _, d := range f.Decls {
			if d, ok := d.(*ast.FuncDecl); ok && d.Recv == nil && (strings.HasPrefix(d.Name.Name, "Test") || strings.HasPrefix(d.Name.Name, "Fuzz")) {
				names[path.Dir(file)+": "+d.Name.Name] = true
			}
		}
	})
	return names
}

// each parses all files below a directory. Names are relative to it.
func each(t *testing.T, root string, do func(file string, f *ast.File)) {
	t.Helper()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(name, ".go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		do(filepath.ToSlash(rel), f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Lesson 25: a backup server's console handed what it was sent to a shell, and
// with it the keys to every backup. Here no shell is ever started, and what
// other programs are is known.
func TestLesson25NoShell(t *testing.T) {
	known := map[string]string{
		"internal/node/guard.go":               "this program",
		"internal/node/serve.go":               "this program",
		"internal/hypervisor/libvirt/dial.go":  "ssh, whose far end quotes every word: see TestLesson25Quoted there",
		"internal/hypervisor/libvirt/serve.go": "ssh, without a command",
	}
	seen := 0
	for _, dir := range []string{"internal", "cmd"} {
		each(t, filepath.Join("../..", dir), func(file string, f *ast.File) {
			file = path.Join(dir, file)
			if strings.HasSuffix(file, "_test.go") || testers[path.Dir(file)] != "" {
				return
			}
			ast.Inspect(f, func(n ast.Node) bool {
				s, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if pkg, ok := s.X.(*ast.Ident); ok && (pkg.Name == "exec" && strings.HasPrefix(s.Sel.Name, "Command") || s.Sel.Name == "StartProcess") {
					seen++
					if known[file] == "" {
						t.Errorf("%s starts a program: which, and with whose words?", file)
					}
				}
				return true
			})
		})
	}
	if seen < len(known) {
		t.Errorf("%d places start programs, %d are known", seen, len(known))
	}
}
