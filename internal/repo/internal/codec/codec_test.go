package codec

import (
	"bytes"
	"crypto/rand"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

func TestRoundTrip(t *testing.T) {
	noise := make([]byte, 65536)
	rand.Read(noise)
	var all [][]byte
	for range 2 {
		all = append(all, nil, []byte{0}, []byte("a"), bytes.Repeat([]byte("text "), 13000), noise)
	}
	for i, p := range all {
		e := Compressor(2*i/len(all)).Encode([]byte("before"), p)
		if !bytes.HasPrefix(e, []byte("before")) || len(e) > len("before")+1+len(p) {
			t.Fatalf("%d bytes become %d", len(p), len(e))
		}
		got, err := Decode([]byte("x"), e[6:], len(p))
		if err != nil || !bytes.Equal(got[1:], p) {
			t.Fatalf("%d bytes: %v", len(p), err)
		}
		if len(p) > 1000 && len(p) != len(noise) && (e[6] == plain || len(e) > len(p)/10) {
			t.Errorf("%d bytes of text become %d with codec %d", len(p), len(e), e[6])
		}
		if len(p) > 0 {
			if _, err := Decode(nil, e[6:], len(p)-1); err == nil {
				t.Error("more is decoded than is allowed")
			}
		}
	}
}

// Two frames, a frame without its size, and a bomb are refused.
func TestHostile(t *testing.T) {
	enc, _ := zstd.NewWriter(nil)
	frame := enc.EncodeAll(make([]byte, 1000), nil)
	bomb := enc.EncodeAll(make([]byte, 100<<20), nil)
	var streamed bytes.Buffer
	w, _ := zstd.NewWriter(&streamed)
	w.Write(make([]byte, 1000))
	w.Flush()
	w.Close()
	for name, p := range map[string][]byte{
		"two frames": append(append([]byte{1}, frame...), frame...),
		"no size":    append([]byte{1}, streamed.Bytes()...),
		"bomb":       append([]byte{1}, bomb...),
		"codec":      {9, 1, 2},
		"empty":      {},
		"snappy":     append([]byte{2}, s2.EncodeSnappy(nil, make([]byte, 1001))...),
		"long":       {2, 0xff, 0xff, 0xff, 0xff, 0x7f, 0},
		"cut":        append([]byte{2}, s2.EncodeSnappy(nil, bytes.Repeat([]byte("abcdefgh1"), 100))[:20]...),
		"nothing":    {2},
	} {
		if got, err := Decode(nil, p, 1000); err == nil {
			t.Errorf("%s: %d bytes", name, len(got))
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(Fast.Encode(nil, bytes.Repeat([]byte("ab"), 100)))
	f.Add(Small.Encode(nil, bytes.Repeat([]byte("ab"), 100)))
	f.Fuzz(func(t *testing.T, p []byte) {
		if got, err := Decode(nil, p, 4096); err == nil && len(got) > 4096 {
			t.Errorf("%d bytes", len(got))
		}
	})
}

// Lesson 8: a compressor's defect stored data that could not be decompressed.
// What does not decode to what was encoded is stored plain.
func TestLesson08BrokenEncoder(t *testing.T) {
	p := bytes.Repeat([]byte("some text "), 100)
	good := Fast.Encode(nil, p)
	if good[0] != snap {
		t.Fatal("not compressed")
	}
	for what, c := range map[string]struct {
		check []byte
		err   error
	}{
		"decodes to something else": {append(bytes.Repeat([]byte("some text "), 99), "some texts"...), nil},
		"decodes to less":           {p[:len(p)-1], nil},
		"does not decode":           {p, ErrCodec},
	} {
		e := proven(append([]byte("before"), good...), len("before"), p, c.check, c.err)
		if got, err := Decode(nil, e[len("before"):], len(p)); err != nil || !bytes.Equal(got, p) || e[len("before")] != plain {
			t.Errorf("%s: %d bytes, %v", what, len(got), err)
		}
	}
}
