package layers

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "holdfast"

// side of the house.
type side int

const (
	core  side = iota // never sees the right
	right             // vendors and protocols
	both              // sees all that is lower
)

type room struct {
	level int
	side  side
}

// table has every package by its path in the module. One that ends in "/"
// stands for all below it, which form a unit with it and may import one
// another.
var table = map[string]room{
	"internal/osfile": {-1, core},

	"internal/disk": {0, core},
	"internal/blob": {0, core},

	"internal/mover":      {1, core},
	"internal/overlay":    {1, core},
	"internal/hypervisor": {1, core},
	"internal/retention":  {1, core},

	"internal/repo":           {2, core},
	"internal/repo/internal/": {2, core},
	"internal/publish":        {2, core},
	"internal/state":          {2, core},

	"internal/backup":   {3, core},
	"internal/recovery": {3, core},
	"internal/replica":  {3, core},
	"internal/lab":      {3, core},
	"internal/guestfs":  {3, core},
	"internal/job":      {3, core},

	"internal/blob/s3":     {1, right},
	"internal/blob/harden": {1, right},
	"internal/nbd":         {1, right},
	"internal/nfs":         {1, right},
	"internal/iscsi":       {1, right},
	"internal/image":       {1, right},
	"internal/image/":      {1, right},

	"internal/hypervisor/folder":  {2, right},
	"internal/hypervisor/libvirt": {2, right},
	"internal/hypervisor/hyperv":  {2, right},
	"internal/hypervisor/vsphere": {2, right},

	"internal/node":   {4, both},
	"internal/server": {5, core},
	"internal/proxy":  {5, core},
	"cmd/holdfast":    {6, core},

	// This package, and what runs the program from outside.
	"internal/layers": {0, core},
	"bench":           {8, both},
	"test/":           {7, both},
}

// testers are the packages for tests, each with the one that it is for.
var testers = map[string]string{
	"internal/disk/disktest":        "internal/disk",
	"internal/blob/blobtest":        "internal/blob",
	"internal/blob/s3/s3test":       "internal/blob/s3",
	"internal/hypervisor/hypertest": "internal/hypervisor",
	"internal/repo/repotest":        "internal/repo",
}

// units are packages that form one with others, by prefix.
var units = []string{"internal/repo/", "internal/image/", "test/"}

// sideways are the imports within a level that are meant.
var sideways = map[[2]string]bool{
	{"internal/lab", "internal/recovery"}: true,
}

// foreign modules that only some packages may import; others are free.
var foreign = map[string]string{
	"github.com/digitalocean/go-libvirt": "internal/hypervisor/libvirt",
	"github.com/minio/minio-go":          "internal/blob/s3",
	"github.com/spf13/cobra":             "cmd/holdfast",
	"github.com/vbauerster/mpb":          "cmd/holdfast",
	"golang.org/x/term":                  "cmd/holdfast",
}

// find returns a package's place.
func find(pkg string) (room, bool) {
	if r, ok := table[pkg]; ok {
		return r, true
	}
	for dir := pkg; dir != "."; dir = path.Dir(dir) {
		if r, ok := table[path.Dir(dir)+"/"]; ok {
			return r, true
		}
	}
	return room{}, false
}

func sameUnit(a, b string) bool {
	for _, u := range units {
		if strings.HasPrefix(a+"/", u) && strings.HasPrefix(b+"/", u) {
			return true
		}
	}
	return false
}

// check returns why a file of package from, a test or not, may not import to;
// nil if it may.
func check(from string, test bool, to string) error {
	if of, ok := testers[from]; ok {
		// As a test of the package that it is for.
		from, test = of, true
	}
	if to != module && !strings.HasPrefix(to, module+"/") {
		for mod, owner := range foreign {
			if (to == mod || strings.HasPrefix(to, mod+"/")) && from != owner {
				return fmt.Errorf("is for %s only", owner)
			}
		}
		return nil
	}
	to = strings.TrimPrefix(to, module+"/")
	if from == to {
		return nil
	}
	src, ok := find(from)
	if !ok {
		return fmt.Errorf("%s is not in the table of internal/layers", from)
	}
	if _, ok := testers[to]; ok {
		if test || src.level >= 7 {
			return nil
		}
		return fmt.Errorf("is for tests")
	}
	dst, ok := find(to)
	switch {
	case !ok:
		return fmt.Errorf("is not in the table of internal/layers")
	case sameUnit(from, to), sideways[[2]string{from, to}]:
		return nil
	case test && strings.HasPrefix(to, "test/lab"): // real guests, for tests that ask for them
		return nil
	case test && src.side == right && to == "internal/mover": // what else would fill the disks of tests
		return nil
	case src.side == core && dst.side == right:
		return fmt.Errorf("is on the right side, which the core gets through node")
	case src.side == right && strings.HasPrefix(to+"/", "internal/image/"):
		return nil
	case dst.level >= src.level:
		return fmt.Errorf("is on level %d, not below %d", dst.level, src.level)
	}
	return nil
}

// TestImports parses every file of the module, whatever system it is for.
func TestImports(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	err = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		base := path.Base(rel)
		if d.IsDir() {
			if rel != "." && (base == "testdata" || strings.HasPrefix(base, ".") || rel == "bin" || rel == "bench/data") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(base, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		pkg := path.Dir(rel)
		seen[pkg] = true
		if _, ok := find(pkg); !ok && testers[pkg] == "" {
			t.Errorf("%s: its package is not in the table of internal/layers", rel)
		}
		for _, spec := range f.Imports {
			to, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if err := check(pkg, strings.HasSuffix(base, "_test.go"), to); err != nil {
				t.Errorf("%s: imports %s, which %v", rel, to, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, pkg := range []string{"internal/disk", "internal/overlay", "internal/layers"} {
		if !seen[pkg] {
			t.Errorf("%s was not looked at", pkg)
		}
	}
}

// TestPolicy shows what the table allows and what not.
func TestPolicy(t *testing.T) {
	const yes, no = true, false
	for _, c := range []struct {
		from string
		test bool
		to   string
		want bool
	}{
		{"internal/overlay", no, "holdfast/internal/disk", yes},
		{"internal/disk", no, "holdfast/internal/overlay", no},
		{"internal/overlay", no, "holdfast/internal/mover", no},
		{"internal/publish", no, "holdfast/internal/repo", no},
		{"internal/publish", no, "holdfast/internal/overlay", yes},
		{"internal/backup", no, "holdfast/internal/repo", yes},
		{"internal/backup", no, "holdfast/internal/recovery", no},
		{"internal/lab", no, "holdfast/internal/recovery", yes},
		{"internal/recovery", no, "holdfast/internal/lab", no},
		{"internal/backup", no, "holdfast/internal/hypervisor/libvirt", no},
		{"internal/backup", yes, "holdfast/internal/hypervisor/libvirt", no},
		{"internal/backup", yes, "holdfast/internal/hypervisor/hypertest", yes},
		{"internal/backup", no, "holdfast/internal/hypervisor/hypertest", no},
		{"internal/publish", no, "holdfast/internal/nbd", no},
		{"internal/repo", no, "holdfast/internal/repo/internal/tree", yes},
		{"internal/repo/internal/tree", no, "holdfast/internal/repo/internal/pack", yes},
		{"internal/repo/internal/tree", no, "holdfast/internal/blob", yes},
		{"internal/repo/internal/tree", no, "holdfast/internal/state", no},
		{"internal/hypervisor/libvirt", no, "holdfast/internal/nbd", yes},
		{"internal/hypervisor/libvirt", no, "holdfast/internal/hypervisor/folder", no},
		{"internal/hypervisor/libvirt", no, "holdfast/internal/backup", no},
		{"internal/hypervisor/libvirt", no, "holdfast/internal/repo", no},
		{"internal/hypervisor/libvirt", yes, "holdfast/test/lab", yes},
		{"internal/hypervisor/libvirt", no, "holdfast/test/lab", no},
		{"internal/nbd", no, "holdfast/internal/image/qcow2", yes},
		{"internal/image", no, "holdfast/internal/image/qcow2", yes},
		{"internal/image/qcow2", no, "holdfast/internal/nbd", no},
		{"internal/node", no, "holdfast/internal/hypervisor/libvirt", yes},
		{"internal/node", no, "holdfast/internal/recovery", yes},
		{"internal/node", no, "holdfast/internal/server", no},
		{"cmd/holdfast", no, "holdfast/internal/node", yes},
		{"cmd/holdfast", no, "holdfast/internal/nbd", no},
		{"cmd/holdfast", no, "holdfast/internal/disk/disktest", no},
		{"internal/hypervisor/hypertest", no, "holdfast/internal/disk/disktest", yes},
		{"internal/repo/repotest", no, "holdfast/internal/blob/blobtest", yes},
		{"internal/unheard", no, "holdfast/internal/disk", no},
		{"internal/backup", no, "holdfast/internal/unheard", no},
		{"internal/backup", no, "github.com/spf13/cobra", no},
		{"internal/hypervisor/libvirt", no, "github.com/digitalocean/go-libvirt/socket/dialers", yes},
		{"internal/backup", no, "golang.org/x/sync/errgroup", yes},
		{"internal/backup", no, "fmt", yes},
		{"test/demo", no, "holdfast/test/lab", yes},
	} {
		if err := check(c.from, c.test, c.to); (err == nil) != c.want {
			t.Errorf("%s (test %v) imports %s: %v, want allowed %v", c.from, c.test, c.to, err, c.want)
		}
	}
}
