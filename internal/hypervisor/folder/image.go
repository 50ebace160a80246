package folder

import (
	"context"
	"errors"
	"path/filepath"

	"holdfast/internal/image"
)

// Recognise tells the format of the file at rel, a path relative to the
// folder, by the rules of the package comment; a file that they do not take
// for an image is raw. note is what there is to say about the choice, "" for
// nothing.
func (s *Source) Recognise(ctx context.Context, rel string) (format, note string, err error) {
	info, err := s.root.Stat(filepath.FromSlash(rel)) // where a link leads to
	if err != nil {
		return "", "", err
	}
	m, is := s.classify(ctx, rel, info.Mode())
	switch {
	case !is && m.err != nil:
		return "", "", m.err
	case !is:
		return image.RawName, "", nil
	case m.format == "" || m.refused:
		return "", "", m.err
	}
	return m.format, m.note, nil
}

// OpenImage opens the image at rel with its parents, which like all that it
// names are looked for in the folder only. known are the formats that can be
// read. Nothing is locked: somebody may be writing to it. further is told of
// each file that an image leads to, its parent or another; nil is nobody.
func (s *Source) OpenImage(ctx context.Context, known image.Formats, rel, format string, further func(from, rel string)) (*image.Chain, error) {
	f, err := s.file(rel)
	if err != nil {
		return nil, err
	}
	return known.Open(ctx, f, format, s.resolver(further))
}

// OpenAlone is OpenImage without the image's parents.
func (s *Source) OpenAlone(ctx context.Context, known image.Formats, rel, format string, further func(from, rel string)) (image.Layer, error) {
	f, err := s.file(rel)
	if err != nil {
		return nil, err
	}
	l, err := known.OpenLayer(ctx, f, format, s.resolver(further))
	if err != nil {
		return nil, errors.Join(err, f.Disk.Close())
	}
	return l, nil
}

// resolver opens files of the folder.
func (s *Source) resolver(opened func(from, rel string)) image.Resolver {
	return func(_ context.Context, from, name string) (image.File, error) {
		rel, moved, err := s.locate(from, name)
		if err != nil {
			return image.File{}, err
		}
		if opened != nil {
			opened(from, rel)
		}
		f, err := s.file(rel)
		f.Moved = moved
		return f, err
	}
}
