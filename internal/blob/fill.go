package blob

import "context"

// Getter is the part of a Store that reads.
type Getter interface {
	Get(ctx context.Context, name string, off, n int64) ([]byte, error)
}

// Filler is optional: a store that reads into memory which the caller has.
type Filler interface {
	// Fill is Get of len(p) bytes into p.
	Fill(ctx context.Context, name string, off int64, p []byte) error
}

// Fill reads len(p) bytes of an object at off into p. It fails as Get does;
// what p holds then is not told.
func Fill(ctx context.Context, s Getter, name string, off int64, p []byte) error {
	if f, ok := s.(Filler); ok {
		return f.Fill(ctx, name, off, p)
	}
	q, err := s.Get(ctx, name, off, int64(len(p)))
	copy(p, q)
	return err
}

// OneHead is optional, of a store on a disk of this machine: what is read goes
// fastest one after the other, each read going on where the last one ended. Of
// other stores many are read from at once, since they are far away.
type OneHead interface{ OneHead() }
