package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

// keyFile is what ExportKeys writes: config, key slots and keyrings as they are
// stored, where passphrases and the root key seal them. It is a copy of what a
// repository cannot be opened without, and opens nothing by itself.
type keyFile struct {
	Format     string      `json:"format"`
	Version    int         `json:"version"`
	Repository string      `json:"repository"`
	Made       time.Time   `json:"made"`
	Objects    []keyObject `json:"objects"` // in the order in which they are put back
}

type keyObject struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
	Data   []byte `json:"data"` // base 64
}

const (
	keyFileFormat  = "holdfast keys"
	keyFileVersion = 1
	// MaxKeyFile bounds a key file, bytes.
	MaxKeyFile = 64 << 20
)

// ErrKeyFile: not a key file, or a damaged one.
var ErrKeyFile = errors.New("not a whole key file")

// ExportKeys gives a file with all that opens the repository now.
func (r *Repo) ExportKeys(ctx context.Context) ([]byte, error) {
	docs, u, err := r.slots(ctx)
	if err != nil {
		return nil, err
	}
	if r.remaining(docs, u, "") == 0 {
		return nil, fmt.Errorf("keys: %w: no key slot opens the newest keyring", ErrDamaged)
	}
	rings, err := readRings(ctx, r.store, r.id)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, k := range docs {
		if r.slotState(u, k) == SlotCurrent {
			names = append(names, slotName(k.id))
		}
	}
	for _, d := range rings.list {
		if d.opens(u.root) {
			names = append(names, d.name)
		}
	}
	f := keyFile{Format: keyFileFormat, Version: keyFileVersion, Repository: r.ID(), Made: time.Now().UTC()}
	for _, name := range append(names, configName) {
		p, err := r.store.Get(ctx, name, 0, -1)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(p)
		f.Objects = append(f.Objects, keyObject{name, hex.EncodeToString(sum[:]), p})
	}
	return json.MarshalIndent(f, "", " ")
}

// KeyImport is what ImportKeys did, or would do.
type KeyImport struct {
	Repository string    `json:"repository"`
	Made       time.Time `json:"made"`    // when the file was
	Put        []string  `json:"put"`     // objects that were missing
	There      []string  `json:"there"`   // that are there
	Differs    []string  `json:"differs"` // that are there, damaged or others; never touched
	Old        []string  `json:"old"`     // of a root key that has been replaced; not put back
}

// ImportKeys puts back what a key file has and the store lacks. Nothing that is
// there is changed. What was removed since the file was made comes back too,
// until Tidy.
func ImportKeys(ctx context.Context, s blob.Store, file []byte, dryRun bool) (KeyImport, error) {
	f, id, err := parseKeyFile(file)
	if err != nil {
		return KeyImport{}, err
	}
	done := KeyImport{Repository: f.Repository, Made: f.Made}
	if err := belongs(ctx, s, id); err != nil {
		return done, err
	}
	rings, err := readRings(ctx, s, id)
	if err != nil {
		return done, err
	}
	generation := 0 // of the newest keyring there
	if len(rings.list) > 0 {
		generation = rings.list[0].generation()
	}
	for _, o := range f.Objects {
		there, err := s.Get(ctx, o.Name, 0, -1)
		switch {
		case err == nil && bytes.Equal(there, o.Data):
			done.There = append(done.There, o.Name)
		case err == nil:
			done.Differs = append(done.Differs, o.Name)
		case !errors.Is(err, blob.ErrNotExist):
			return done, err
		case o.Name != configName && Generation(o.Name, o.Data) < generation:
			done.Old = append(done.Old, o.Name)
		default:
			if !dryRun {
				if err := s.Put(ctx, o.Name, o.Data); err != nil {
					return done, fmt.Errorf("put back %s: %w", o.Name, err)
				}
			}
			done.Put = append(done.Put, o.Name)
		}
	}
	return done, nil
}

// parseKeyFile checks a key file as far as that goes without a key.
func parseKeyFile(file []byte) (f keyFile, id [16]byte, err error) {
	if err := json.Unmarshal(file, &f); err != nil {
		return f, id, fmt.Errorf("%w: %w", ErrKeyFile, err)
	}
	if f.Format != keyFileFormat {
		return f, id, ErrKeyFile
	}
	if f.Version != keyFileVersion {
		return f, id, fmt.Errorf("key file: %w: version %d, this program knows %d", ErrVersion, f.Version, keyFileVersion)
	}
	b, err := hex.DecodeString(f.Repository)
	if err != nil || len(b) != len(id) {
		return f, id, fmt.Errorf("%w: repository %.80q", ErrKeyFile, f.Repository)
	}
	id = [16]byte(b)
	for _, o := range f.Objects {
		if sum := sha256.Sum256(o.Data); hex.EncodeToString(sum[:]) != o.SHA256 {
			return f, id, fmt.Errorf("%w: the bytes of %q have changed", ErrKeyFile, o.Name)
		}
		if err := checkKeyObject(o, id); err != nil {
			return f, id, fmt.Errorf("%w: %q: %w", ErrKeyFile, o.Name, err)
		}
	}
	// config makes the repository: it comes last.
	slices.SortStableFunc(f.Objects, func(a, b keyObject) int { return strings.Compare(b.Name, a.Name) })
	return f, id, nil
}

func checkKeyObject(o keyObject, id [16]byte) error {
	if err := blob.CheckName(o.Name); err != nil {
		return err
	}
	if o.Name == configName {
		_, repo, err := parseConfig(o.Data)
		if err == nil && repo != id {
			err = seal.ErrForeign
		}
		return err
	}
	return Check(o.Name, o.Data, id)
}

// belongs refuses a store that is another repository's, or nobody's.
func belongs(ctx context.Context, s blob.Store, id [16]byte) error {
	p, err := s.Get(ctx, configName, 0, seal.HeaderLen)
	if errors.Is(err, blob.ErrNotExist) {
		n, err := chain.Last(ctx, s)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("%w: neither its config nor any commit is there", ErrNotRepository)
		}
		p, err = s.Get(ctx, chain.Name(n), 0, seal.HeaderLen)
		if err != nil {
			return err
		}
	} else if err != nil {
		if errors.Is(err, blob.ErrTruncated) {
			return nil // it is damaged, which the result says
		}
		return err
	}
	h, err := seal.ParseHeader(p, string(p[:4]))
	if err == nil && h.Repo != id {
		return fmt.Errorf("the key file is for repository %x, this is %x: %w", id, h.Repo, seal.ErrForeign)
	}
	return nil // damaged, which the result says
}

// Tidy deletes what an import has put back though it was removed, and what
// changes of keys that were cut off have left.
func (r *Repo) Tidy(ctx context.Context) error { return r.tidy(ctx) }
