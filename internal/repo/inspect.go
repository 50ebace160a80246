package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

// What a mechanic wants to see of a repository. Nothing here changes anything.

// Stats are a repository's numbers.
type Stats struct {
	Repository string      `json:"repository"`
	Entries    uint64      `json:"chain_entries"`
	Points     int         `json:"points"`
	Histories  int         `json:"histories"`
	Indexes    int         `json:"index_objects"`
	Kinds      []KindStats `json:"packs"`
	Chunks     int64       `json:"chunks"`      // stored, copies counted
	PlainBytes int64       `json:"plain_bytes"` // of these, before compression
	DiskBytes  int64       `json:"disk_bytes"`  // sizes of all disks and files of all points
	UsedBytes  int64       `json:"used_bytes"`  // of these, what is not zeros
	Dedupe     float64     `json:"dedupe_ratio"`
	Compress   float64     `json:"compression_ratio"`
	Quarantine int         `json:"quarantined_packs"`
	Distrusted int         `json:"distrusted_items"`
	Keyring    Keyring     `json:"keys"`
}

// KindStats are the numbers of one kind of packs.
type KindStats struct {
	Kind  string `json:"kind"` // "chunks" or "nodes"
	Packs int    `json:"packs"`
	Items int64  `json:"items"`
	Bytes int64  `json:"stored_bytes"`
}

func packKind(k uint16) string {
	switch k {
	case pack.Chunks:
		return "chunks"
	case pack.Nodes:
		return "nodes"
	}
	return fmt.Sprint("kind ", k)
}

// PackInfo is a pack as the index has it.
type PackInfo struct {
	Pack        string `json:"pack"` // SHA-256
	Kind        string `json:"kind"`
	Size        int64  `json:"size"`
	Items       int    `json:"items"`
	Index       string `json:"index"` // the index object that lists it
	Quarantined bool   `json:"quarantined"`
}

// Packs calls f for each pack that a live index object lists; index objects in
// the order of their names.
func (r *Repo) Packs(ctx context.Context, f func(PackInfo) error) error {
	if err := r.refresh(ctx); err != nil {
		return err
	}
	s := r.current()
	return r.eachIndex(ctx, s, func(d [32]byte, packs []index.Pack) error {
		for _, k := range packs {
			p := PackInfo{hex.EncodeToString(k.Name[:]), packKind(k.Kind), k.Size, len(k.Items), hex.EncodeToString(d[:]), s.Quarantine[k.Name] != 0}
			if err := f(p); err != nil {
				return err
			}
		}
		return nil
	})
}

func (r *Repo) eachIndex(ctx context.Context, s *chain.State, f func([32]byte, []index.Pack) error) error {
	names := slices.SortedFunc(maps.Keys(s.Indexes), func(a, b [32]byte) int { return slices.Compare(a[:], b[:]) })
	for _, d := range names {
		packs, err := r.readIndex(ctx, d)
		if err != nil {
			return err
		}
		if err := f(d, packs); err != nil {
			return err
		}
	}
	return nil
}

// Stats reads all index objects and all maps.
func (r *Repo) Stats(ctx context.Context) (*Stats, error) {
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	s := r.current()
	st := &Stats{Repository: r.ID(), Entries: s.Head, Points: len(s.Points), Indexes: len(s.Indexes),
		Quarantine: len(s.Quarantine), Distrusted: len(s.Bad), Keyring: r.Keyring()}
	kinds := map[uint16]*KindStats{pack.Chunks: {Kind: packKind(pack.Chunks)}, pack.Nodes: {Kind: packKind(pack.Nodes)}}
	seen := map[[32]byte]bool{}
	err := r.eachIndex(ctx, s, func(_ [32]byte, packs []index.Pack) error {
		for _, k := range packs {
			if seen[k.Name] {
				continue
			}
			seen[k.Name] = true
			n := kinds[k.Kind]
			if n == nil {
				return fmt.Errorf("pack %x: %w: kind %d", k.Name[:8], ErrVersion, k.Kind)
			}
			n.Packs++
			n.Items += int64(len(k.Items))
			n.Bytes += k.Size
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	st.Kinds = []KindStats{*kinds[pack.Chunks], *kinds[pack.Nodes]}
	st.Chunks = kinds[pack.Chunks].Items
	st.PlainBytes = st.Chunks * ChunkSize
	if err := r.countUsed(ctx, s, st); err != nil {
		return nil, err
	}
	if st.PlainBytes > 0 {
		st.Dedupe = ratio(st.UsedBytes, st.PlainBytes)
		st.Compress = ratio(st.PlainBytes, st.Kinds[0].Bytes)
	}
	return st, nil
}

// ratio is a / b in hundredths.
func ratio(a, b int64) float64 { return math.Round(100*float64(a)/float64(b)) / 100 }

// countUsed goes through the points' maps, equal subtrees once.
func (r *Repo) countUsed(ctx context.Context, s *chain.State, st *Stats) error {
	chunks := map[tree.ID]int64{}
	histories := map[HistoryID]bool{}
	disk := func(size int64, root Root) error {
		st.DiskBytes += size
		t, err := tree.ParseRoot(string(root), size)
		if err != nil {
			return err
		}
		n, err := r.countChunks(ctx, chunks, t.ID, t.Levels-1)
		st.UsedBytes += n * ChunkSize
		return err
	}
	for _, p := range s.Points {
		histories[p.History] = true
		for _, d := range p.Disks {
			if err := disk(d.Size, d.Root); err != nil {
				return fmt.Errorf("point %s, disk %s: %w", p.ID, d.ID, err)
			}
		}
		for _, f := range p.Files {
			if err := disk(f.Size, f.Root); err != nil {
				return fmt.Errorf("point %s, %s: %w", p.ID, f.Name, err)
			}
		}
	}
	st.Histories = len(histories)
	return nil
}

func (r *Repo) countChunks(ctx context.Context, known map[tree.ID]int64, id tree.ID, level int) (int64, error) {
	if id == (tree.ID{}) {
		return 0, nil
	}
	if n, ok := known[id]; ok {
		return n, nil
	}
	node, err := r.node(ctx, id, level)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, child := range node.Children {
		switch {
		case child == (tree.ID{}):
		case level == 0:
			sum++
		default:
			n, err := r.countChunks(ctx, known, child, level-1)
			if err != nil {
				return 0, err
			}
			sum += n
		}
	}
	known[id] = sum
	return sum, nil
}

// Object is a stored object, taken apart.
type Object struct {
	Name       string          `json:"object"`
	Size       int64           `json:"size"`
	SHA256     string          `json:"sha256"`
	Magic      string          `json:"magic"`
	Kind       uint16          `json:"kind"`
	Meaning    string          `json:"meaning,omitempty"` // of the kind
	Master     uint32          `json:"master"`            // number of the master key; 0 for none
	Repository string          `json:"repository"`
	Clear      json.RawMessage `json:"clear,omitempty"`
	Sealed     any             `json:"sealed,omitempty"`    // the opened part, as JSON; of packs and index objects what is in them
	Signature  string          `json:"signature,omitempty"` // "good" or why not
	Problem    string          `json:"problem,omitempty"`   // what could not be read
}

// Item is a chunk or node in a pack.
type Item struct {
	ID     string `json:"id"`
	Pack   string `json:"pack,omitempty"`
	Number uint32 `json:"number"`
	Offset uint32 `json:"offset"`          // in the pack
	Stored uint32 `json:"stored"`          // sealed bytes
	Plain  uint32 `json:"plain,omitempty"` // bytes; where it is known
}

// PackItems are a pack's items as an index object has them.
type PackItems struct {
	Pack  string `json:"pack"`
	Kind  string `json:"kind"`
	Size  int64  `json:"size"`
	Items []Item `json:"items"`
}

const masked = "masked; --secrets shows it"

// Object reads a stored object and opens what the keys open. Keys in it are
// masked unless secrets says otherwise. What is wrong with it is told in the
// result; an error means that it could not be read at all.
func (r *Repo) Object(ctx context.Context, name string, secrets bool) (*Object, error) {
	if err := blob.CheckName(name); err != nil {
		return nil, err
	}
	p, err := r.store.Get(ctx, name, 0, -1)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(p)
	o := &Object{Name: name, Size: int64(len(p)), SHA256: hex.EncodeToString(sum[:])}
	if err := r.dissect(ctx, o, p, secrets); err != nil {
		o.Problem = err.Error()
	}
	return o, nil
}

func (r *Repo) dissect(ctx context.Context, o *Object, p []byte, secrets bool) error {
	if len(p) < seal.HeaderLen {
		return fmt.Errorf("%w: %d bytes", ErrDamaged, len(p))
	}
	o.Magic = string(p[:4])
	h, err := seal.ParseHeader(p, o.Magic)
	if err != nil {
		return err
	}
	o.Kind, o.Master, o.Repository = h.Kind, h.Key, hex.EncodeToString(h.Repo[:])
	if h.Repo != r.id {
		return seal.ErrForeign
	}
	if o.Magic == seal.Pack {
		return r.dissectPack(ctx, o, p)
	}
	raw, err := seal.Parse(p, o.Magic)
	if err != nil {
		return err
	}
	if !json.Valid(raw.Clear) {
		return fmt.Errorf("%w: the clear part is not JSON", ErrDamaged)
	}
	o.Clear = json.RawMessage(raw.Clear)
	if seal.Signed(o.Magic) {
		o.Signature = "good"
		if err := raw.Verify(r.id, r.pub); err != nil {
			o.Signature = err.Error()
		}
	}
	return r.dissectSealed(ctx, o, raw, secrets)
}

// purposes of the documents that a master key opens.
var purposes = map[string]string{seal.Index: "index", seal.Entry: "chain", seal.Lease: "lease", seal.Beat: "lease", seal.Pin: "pin", seal.Tier: "tier"}

func (r *Repo) dissectSealed(ctx context.Context, o *Object, raw *seal.Raw, secrets bool) error {
	var content []byte
	var err error
	switch o.Magic {
	case seal.Config:
		return nil
	case seal.Slot:
		o.Sealed = map[string]string{"root key": "opens with its passphrase only"}
		return nil
	case seal.Keyring:
		return r.dissectRing(o, raw, secrets)
	default:
		purpose, ok := purposes[o.Magic]
		if !ok {
			return fmt.Errorf("%w: magic %q", ErrVersion, o.Magic)
		}
		master, keyErr := r.master(ctx, raw.Header.Key)
		if keyErr != nil {
			return keyErr
		}
		content, err = raw.Open(master, purpose)
	}
	if err != nil {
		return err
	}
	if o.Magic == seal.Entry {
		o.Meaning = chain.Kind(o.Kind).String()
	}
	if o.Magic == seal.Index {
		packs, err := openIndex(raw.Clear, content)
		o.Sealed = packs
		return err
	}
	if !json.Valid(content) {
		return fmt.Errorf("%w: the sealed part is not JSON", ErrDamaged)
	}
	o.Sealed = json.RawMessage(content)
	return nil
}

func (r *Repo) dissectRing(o *Object, raw *seal.Raw, secrets bool) error {
	content, err := raw.Open(r.keys.Now().Root, "keyring")
	if err != nil {
		return fmt.Errorf("the root key does not open it: %w", err)
	}
	if secrets {
		o.Sealed = json.RawMessage(content)
		return nil
	}
	ring, err := seal.ParseRing(content)
	if err != nil {
		return err
	}
	masters := []map[string]any{}
	for _, m := range ring.Masters {
		masters = append(masters, map[string]any{"number": m.Number, "key": masked})
	}
	o.Sealed = map[string]any{"ids": masked, "sign": masked, "masters": masters}
	return nil
}

func (r *Repo) dissectPack(ctx context.Context, o *Object, p []byte) error {
	h, master, err := r.packHeader(ctx, p)
	if err != nil {
		return err
	}
	o.Meaning = packKind(h.Kind)
	entries, err := pack.Directory(p, h, master)
	if err != nil {
		return err
	}
	items := make([]Item, len(entries))
	for i, e := range entries {
		items[i] = Item{ID: hex.EncodeToString(e.ID[:]), Number: uint32(i), Offset: e.Offset, Stored: e.Stored, Plain: e.Plain}
	}
	o.Sealed = items
	if !strings.HasSuffix(o.Name, o.SHA256) {
		return fmt.Errorf("%w: its bytes are not what its name says", ErrDamaged)
	}
	return nil
}

func openIndex(clear, content []byte) ([]PackItems, error) {
	packs, err := index.Unmarshal(clear, content)
	if err != nil {
		return nil, err
	}
	out := make([]PackItems, len(packs))
	for i, k := range packs {
		out[i] = PackItems{Pack: hex.EncodeToString(k.Name[:]), Kind: packKind(k.Kind), Size: k.Size, Items: make([]Item, len(k.Items))}
		off := uint32(seal.HeaderLen)
		for j, it := range k.Items {
			out[i].Items[j] = Item{ID: hex.EncodeToString(it.ID[:]), Number: uint32(j), Offset: off, Stored: it.Stored}
			off += it.Stored
		}
	}
	return out, nil
}

// IndexInfo is a live index object.
type IndexInfo struct {
	Index string `json:"index"` // SHA-256
	Packs int    `json:"packs"`
	Items int64  `json:"items"`
}

// Indexes lists the live index objects.
func (r *Repo) Indexes(ctx context.Context) ([]IndexInfo, error) {
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	list := []IndexInfo{}
	err := r.eachIndex(ctx, r.current(), func(d [32]byte, packs []index.Pack) error {
		i := IndexInfo{Index: hex.EncodeToString(d[:]), Packs: len(packs)}
		for _, k := range packs {
			i.Items += int64(len(k.Items))
		}
		list = append(list, i)
		return nil
	})
	return list, err
}

// ErrNoItem: neither an index object nor an item has that id.
var ErrNoItem = errors.New("no such index object or item")

// Index gives the packs and items that an index object lists, when id is its
// SHA-256, or else every place of the chunk or map node that has this id.
func (r *Repo) Index(ctx context.Context, id string) (packs []PackItems, places []Item, err error) {
	d, err := seal.ParseDigest(id)
	if err != nil {
		return nil, nil, fmt.Errorf("%q is not an id: 64 hex digits", id)
	}
	if err := r.refresh(ctx); err != nil {
		return nil, nil, err
	}
	if r.current().Indexes[d] {
		o, err := r.Object(ctx, index.Name(d), false)
		if err != nil {
			return nil, nil, err
		}
		if o.Problem != "" {
			return nil, nil, fmt.Errorf("%s: %w: %s", o.Name, ErrDamaged, o.Problem)
		}
		return o.Sealed.([]PackItems), nil, nil
	}
	all, err := r.index.Lookup(pack.ID(d), nil)
	if err != nil {
		return nil, nil, err
	}
	if len(all) == 0 {
		return nil, nil, fmt.Errorf("%s: %w", id, ErrNoItem)
	}
	for _, p := range all {
		places = append(places, Item{ID: id, Pack: hex.EncodeToString(p.Pack[:]), Number: p.Number, Offset: p.Offset, Stored: p.Stored})
	}
	return nil, places, nil
}
