package index

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"holdfast/internal/repo/internal/seal"
)

// Name is the name of the index object with that digest.
func Name(digest [32]byte) string { return "index/" + hex.EncodeToString(digest[:]) }

// Object is an index object as stored (docs/format.md §5).
type Object struct {
	Packs []Pack // without their items
	Key   uint32 // number of the master key that opens it
	raw   *seal.Raw
}

// Parse reads the index object with that digest, and proves that it is the one that
// was written, as far as that can be done without a key. It fails with
// seal.ErrDamaged, seal.ErrForeign or seal.ErrVersion. The result points into p.
func Parse(p []byte, digest [32]byte, repo [16]byte, verify ed25519.PublicKey) (*Object, error) {
	if sha256.Sum256(p) != digest {
		return nil, fmt.Errorf("%w: its bytes are not what its name says", seal.ErrDamaged)
	}
	raw, err := seal.Parse(p, seal.Index)
	if err == nil {
		err = raw.Verify(repo, verify)
	}
	if err != nil {
		return nil, err
	}
	packs, err := parseClear(raw.Clear)
	if err != nil {
		return nil, err
	}
	return &Object{packs, raw.Header.Key, raw}, nil
}

// Open gives the packs with their items. The bytes that were parsed are
// overwritten: it can be done once.
func (o *Object) Open(master *seal.Key) ([]Pack, error) {
	content, err := o.raw.OpenOver(master, "index")
	if err != nil {
		return nil, err
	}
	return o.Packs, unmarshal(content, o.Packs)
}

// Unmarshal reads the clear part and the opened sealed part of an index object.
func Unmarshal(clear, content []byte) ([]Pack, error) {
	packs, err := parseClear(clear)
	if err != nil {
		return nil, err
	}
	return packs, unmarshal(content, packs)
}

// Marshal gives the bytes of an index object for packs, and their digest. It is
// sealed with the master key of that number; supersedes are the digests of those
// whose place it takes.
func Marshal(packs []Pack, supersedes []seal.Hex, repo [16]byte, number uint32, master *seal.Key, sign ed25519.PrivateKey) (digest [32]byte, p []byte, err error) {
	c := clearPart{Packs: make([]packRow, len(packs)), Made: make([]int64, len(packs)), Supersedes: supersedes}
	for i, k := range packs {
		c.Packs[i], c.Made[i] = packRow{k.Name, k.Size, k.Kind}, k.Made
	}
	clear, err := json.Marshal(c)
	if err != nil {
		return digest, nil, err
	}
	d := seal.Document{Header: seal.NewHeader(seal.Index, 0, number, repo), Clear: clear, Sealed: marshal(packs)}
	if p, err = d.Marshal(master, "index", sign); err != nil {
		return digest, nil, err
	}
	return sha256.Sum256(p), p, nil
}

// clearPart is an index object's clear part.
type clearPart struct {
	Packs      []packRow  `json:"packs"`
	Made       []int64    `json:"made,omitempty"`
	Supersedes []seal.Hex `json:"supersedes,omitempty"`
}

func parseClear(p []byte) ([]Pack, error) {
	var c clearPart
	if err := seal.Unmarshal(p, &c); err != nil {
		return nil, err
	}
	packs := make([]Pack, len(c.Packs))
	for i, row := range c.Packs {
		packs[i] = Pack{Name: row.Name, Size: row.Size, Kind: row.Kind}
		if len(c.Made) == len(packs) {
			packs[i].Made = c.Made[i]
		}
	}
	return packs, nil
}

// packRow is ["<64 hex>", size, kind].
type packRow struct {
	Name [32]byte
	Size int64
	Kind uint16
}

func (p packRow) MarshalJSON() ([]byte, error) {
	return json.Marshal([]any{hex.EncodeToString(p.Name[:]), p.Size, p.Kind})
}

func (p *packRow) UnmarshalJSON(b []byte) error {
	var name string
	row := []any{&name, &p.Size, &p.Kind}
	if err := json.Unmarshal(b, &row); err != nil {
		return err
	}
	d, err := seal.ParseDigest(name)
	p.Name = d
	return err
}
