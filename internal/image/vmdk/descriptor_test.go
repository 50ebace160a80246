package vmdk

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// text makes a descriptor of these lines.
func textOf(lines ...string) string {
	return signature + "\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n" + strings.Join(lines, "\n") + "\n"
}

var goodDescriptors = []string{
	textOf(`RW 8 FLAT "x" 0`),
	textOf(`RW 4 VMFS "x"`, `RDONLY 2 ZERO`, `RW 2 FLAT "x" 5`),
	"# disk descriptorfile\r\nVersion = 3\r\nencoding = \"windows-1252\"\r\ncid = 0xABC\r\nParentCID = 12ab\r\nparentFileNameHint = \"D:\\VMs\\\xfcber.vmdk\"\r\n  CREATETYPE = \"monolithicFlat\"  \r\n\r\n# Extent description \r\nrw\t8\tflat\t\"x\"\t0  \r\nddb.uuid = \"60 00 C2\"\r\nchangeTrackPath=\"x-ctk.vmdk\"",
}

func TestDescriptors(t *testing.T) {
	for i, s := range goodDescriptors {
		d, err := parseDescriptor([]byte(s))
		if err != nil || d.size() != 4096 {
			t.Errorf("descriptor %d: %+v, %v", i, d, err)
		}
	}
	d, err := parseDescriptor([]byte(goodDescriptors[2]))
	if err != nil {
		t.Fatal(err)
	}
	if d.cid != "00000abc" || d.parentCID != "000012ab" || d.createType != "monolithicFlat" || d.uuid != "60 00 C2" || d.extents[0] != (line{no: 10, sectors: 8, kind: kindFlat, name: "x"}) {
		t.Errorf("%+v", d)
	}
	if p := d.parent(); !slices.Equal(p.Names, []string{"über.vmdk"}) || !slices.Equal(p.IDs, []string{"000012ab"}) || p.Format != Name {
		t.Errorf("parent %+v", p)
	}
}

func TestExtentLines(t *testing.T) {
	for s, want := range map[string]line{
		`RW 8 FLAT "a b-flat.vmdk" 0`:           {sectors: 8, kind: kindFlat, name: "a b-flat.vmdk"},
		`RW 8 FLAT "x" 123 partitionUUID`:       {sectors: 8, kind: kindFlat, name: "x", offset: 123},
		`RW  8   VMFS    "x"  `:                 {sectors: 8, kind: kindVMFS, name: "x"},
		`RDONLY 8 sparse "x" 7`:                 {sectors: 8, kind: kindSparse, name: "x"},
		`RW 8 VMFSTHIN "x"`:                     {sectors: 8, kind: kindVMFSThin, name: "x"},
		`RW 8 SESPARSE "x"`:                     {sectors: 8, kind: kindSESparse, name: "x"},
		`RW 8 VMFSSPARSE x`:                     {sectors: 8, kind: kindVMFSSparse, name: "x"},
		`RW 8 ZERO`:                             {sectors: 8, kind: kindZero},
		`RW 8 FLAT "日本.vmdk" 1`:                 {sectors: 8, kind: kindFlat, name: "日本.vmdk", offset: 1},
		"RW 8 FLAT \"\x80\xe4.vmdk\" 1":         {sectors: 8, kind: kindFlat, name: "€ä.vmdk", offset: 1},
		`RW 8 FLAT "json:{\"driver\":\"x\"}" 0`: {},
	} {
		d, err := parseDescriptor([]byte(textOf(s)))
		if want == (line{}) {
			if err == nil && strings.Contains(d.extents[0].name, "driver") {
				t.Errorf("%s: %+v", s, d.extents)
			}
			continue
		}
		want.no = 6
		if err != nil || d.extents[0] != want {
			t.Errorf("%s: %+v, %v", s, d, err)
		}
	}
}

func TestHostileDescriptors(t *testing.T) {
	many := strings.Repeat("RW 1 ZERO\n", maxExtents+1)
	huge := slices.Repeat([]string{fmt.Sprintf("RW %d ZERO", int64(maxDisk/sector/2))}, 3)
	sparse := sparseBytes(t, smallDisk(t))
	for name, x := range map[string]struct {
		text string
		want string
		is   error
	}{
		"no extents":           {textOf(), "no extents", image.ErrFormat},
		"no createType":        {signature + "\nRW 8 ZERO\n", "createType", image.ErrFormat},
		"version 9":            {signature + "\nversion=9\ncreateType=\"custom\"\nRW 8 ZERO\n", "version", image.ErrUnsupported},
		"two CIDs":             {textOf("CID=2", "RW 8 ZERO"), "second cid", image.ErrFormat},
		"CID of words":         {signature + "\nCID=words\ncreateType=\"custom\"\nRW 8 ZERO\n", "CID is", image.ErrFormat},
		"CID too long":         {signature + "\nCID=123456789\ncreateType=\"custom\"\nRW 8 ZERO\n", "CID is", image.ErrFormat},
		"encrypted":            {textOf(`encryption.keySafe = "vmware:key/list/(x)"`, "RW 8 ZERO"), "encrypted", image.ErrUnsupported},
		"encrypted in vSphere": {textOf(`ddb.iofilters = "vmwarevmcrypt"`, "RW 8 ZERO"), "encrypted", image.ErrUnsupported},
		"thousands of extents": {textOf(many), "more than 4096", image.ErrUnsupported},
		"too much disk":        {textOf(huge...), "more than", image.ErrFormat},
		"no sectors":           {textOf("RW 0 ZERO"), "sectors", image.ErrFormat},
		"2^64 sectors":         {textOf("RW 18446744073709551616 ZERO"), "sectors", image.ErrFormat},
		"negative sectors":     {textOf("RW -8 ZERO"), "sectors", image.ErrFormat},
		"2^63 sectors":         {textOf(`RW 9223372036854775808 FLAT "x" 0`), "sectors", image.ErrFormat},
		"offset of 2^63":       {textOf(`RW 8 FLAT "x" 9223372036854775808`), "begins at", image.ErrFormat},
		"offset of words":      {textOf(`RW 8 FLAT "x" far`), "begins at", image.ErrFormat},
		"offset beyond":        {textOf(`RW 8 FLAT "x" 1`), "truncated", image.ErrFormat},
		"longer than its file": {textOf(`RW 9 FLAT "x" 0`), "truncated", image.ErrFormat},
		"unknown kind":         {textOf(`RW 8 WARP "x"`), "WARP", image.ErrUnsupported},
		"not to be read":       {textOf(`NOACCESS 8 ZERO`), "NOACCESS", image.ErrUnsupported},
		"raw device map":       {textOf(`RW 8 VMFSRDM "x"`), "device", image.ErrUnsupported},
		"raw device":           {textOf(`RW 8 VMFSRAW "/vmfs/devices/disks/x"`), "device", image.ErrUnsupported},
		"whole device":         {strings.Replace(textOf(`RW 8 FLAT "/dev/sda" 0`), "custom", "fullDevice", 1), "device", image.ErrUnsupported},
		"no name":              {textOf(`RW 8 FLAT`), "name", image.ErrFormat},
		"empty name":           {textOf(`RW 8 FLAT "" 0`), "name", image.ErrFormat},
		"name without end":     {textOf(`RW 8 FLAT "x`), "no end", image.ErrFormat},
		"name of 2000":         {textOf(`RW 8 FLAT "` + strings.Repeat("x", 2000) + `"`), "2000 bytes", image.ErrFormat},
		"itself":               {textOf(`RW 1 FLAT "a.vmdk" 0`), "names itself", image.ErrFormat},
		"itself otherwise":     {textOf(`RW 1 FLAT "./b/../a.vmdk" 0`), "names itself", image.ErrFormat},
		"itself as sparse":     {textOf(`RW 1 SPARSE "a.vmdk"`), "names itself", image.ErrFormat},
		"absolute":             {textOf(`RW 8 FLAT "/etc/shadow" 0`), "absolute", image.ErrOutside},
		"absolute on Windows":  {textOf(`RW 8 FLAT "C:\pagefile.sys" 0`), "not a path", image.ErrOutside},
		"out of the folder":    {textOf(`RW 8 FLAT "../../x" 0`), "outside", image.ErrOutside},
		"a URL":                {textOf(`RW 8 FLAT "nbd://host/x" 0`), "not a plain file", image.ErrOutside},
		"flat as sparse":       {textOf(`RW 8 SPARSE "x"`), "not that of a sparse file", image.ErrFormat},
		"sparse as COWD":       {textOf(`RW 8 VMFSSPARSE "s"`), "not that of a VMFSSPARSE", image.ErrFormat},
		"sparse as seSparse":   {textOf(`RW 8 SESPARSE "s"`), "not that of a SESPARSE", image.ErrFormat},
		"one file twice":       {textOf(`RW 8 SPARSE "s"`, `RW 8 SPARSE "./s"`), "an extent already", image.ErrFormat},
		"longer than sparse":   {textOf(`RW 1000000 SPARSE "s"`), "the descriptor says", image.ErrFormat},
		"parent not named":     {strings.Replace(textOf("RW 8 ZERO"), "ffffffff", "12345678", 1), "does not name it", image.ErrParent},
		"own parent":           {strings.Replace(textOf("RW 8 ZERO", `parentFileNameHint="a.vmdk"`), "ffffffff", "1", 1), "lead back", image.ErrFormat},
		"another parent":       {strings.Replace(textOf("RW 8 ZERO", `parentFileNameHint="/x/s"`), "ffffffff", "2", 1), "made above", image.ErrParent},
		"too long":             {textOf("RW 8 ZERO", strings.Repeat("#", maxText)), "more than", image.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			all := files{"a.vmdk": []byte(x.text), "x": make([]byte, 4096), "s": sparse}
			c, err := all.open(t.Context(), "a.vmdk")
			if err == nil {
				_ = c.Close()
			}
			if err == nil || !strings.Contains(err.Error(), x.want) || !errors.Is(err, x.is) {
				t.Errorf("error %v, want %q", err, x.want)
			}
		})
	}
}

// TestExtentsOfAllKinds on one disk, some in one file.
func TestExtentsOfAllKinds(t *testing.T) {
	rnd := disktest.Rand(t)
	d := somewhat(t, rnd, 2<<20+512)
	sparse := modelOf(t, d)
	flat := random(rnd, 1<<20)
	all := files{"sub/x": flat, "sub/s": sparseBytes(t, d), "sub/z": streamBytes(t, d)}
	n := len(sparse) / sector
	all["sub/a.vmdk"] = []byte(textOf(`RW 100 FLAT "x" 50`, fmt.Sprintf(`RW %d SPARSE "s"`, n), `RW 33 ZERO`, `RDONLY 70 VMFS "./x"`, `RW 1 FLAT "x" 2047`, fmt.Sprintf(`RW %d SPARSE "z"`, n-1000), `RW 5 VMFSTHIN "x" 149`))
	c, err := all.open(t.Context(), "sub/a.vmdk")
	if err != nil {
		t.Fatal(err)
	}
	model := slices.Concat(flat[50*sector:150*sector], sparse, make([]byte, 33*sector), flat[:70*sector], flat[2047*sector:], sparse[:(n-1000)*sector], flat[149*sector:154*sector])
	compare(t, c, model, rnd)
	list := problems(t, c)
	if len(list) != 2 || !strings.Contains(list[0], "lines 6 and 9") || !strings.Contains(list[1], "lines 6 and 12") {
		t.Errorf("check: %q", list)
	}
	if !warned(c.Layers()[0].Info(), "which counts") {
		t.Errorf("warnings %q", c.Layers()[0].Info().Warnings)
	}
	if names := c.Layers()[0].(*Image).files; len(names) != 4 {
		t.Errorf("%d files are open", len(names))
	}
}

func TestParentNames(t *testing.T) {
	for hint, want := range map[string][]string{
		"":                              nil,
		"base.vmdk":                     {"base.vmdk"},
		"../t/base.vmdk":                {"../t/base.vmdk", "base.vmdk"},
		"./base.vmdk":                   {"./base.vmdk", "base.vmdk"},
		"/vmfs/volumes/5f/vm/base.vmdk": {"base.vmdk"},
		`C:\VMs\base.vmdk`:              {"base.vmdk"},
		`C:base.vmdk`:                   {"base.vmdk"},
		`\\server\share\base.vmdk`:      {"base.vmdk"},
		`..\t\base.vmdk`:                {"../t/base.vmdk", "base.vmdk"},
		"/":                             nil,
	} {
		if got := parentNames(hint); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", hint, got, want)
		}
	}
}

func TestMatch(t *testing.T) {
	d := smallDisk(t)
	for name, x := range map[string]struct {
		b    []byte
		want bool
	}{
		"empty":             {nil, false},
		"short":             {[]byte("KDM"), false},
		"sparse":            {sparseBytes(t, d), true},
		"COWD":              {[]byte("COWD...."), true},
		"descriptor":        {[]byte(goodDescriptors[0]), true},
		"lower case":        {[]byte(goodDescriptors[2]), true},
		"long, of a guest":  {append([]byte(goodDescriptors[0]), make([]byte, maxText)...), false},
		"zeros":             {make([]byte, 4096), false},
		"only its first":    {[]byte("# Disk Desc"), false},
		"a seSparse extent": {[]byte{0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0}, false},
	} {
		got, err := Format().Match(t.Context(), memOf(t.Context(), x.b))
		if err != nil || got != x.want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for name, b := range map[string][]byte{"COWD": bytes.Repeat([]byte("COWD"), 1000), "seSparse": append([]byte{0xbe, 0xba, 0xfe, 0xca}, make([]byte, 4092)...)} {
		if _, err := (files{"a": b}).open(t.Context(), "a"); !errors.Is(err, image.ErrUnsupported) || !strings.Contains(err.Error(), "piece of a disk") {
			t.Errorf("%s alone: %v", name, err)
		}
	}
}
