package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"holdfast/internal/blob/s3/s3test"
	"holdfast/internal/state"
)

// The scripts in testdata are sessions at a shell: a line that begins with "$ "
// is a command, what follows it is what it said (stderr marked with "! "), and
// "[N]" its exit status when that is not 0. Ids, times and durations are
// masked, an empty line said is a dot. "go test -update" writes what was said;
// read the diff.
//
// "$ holdfast" is this program, in a process of its own. The other commands
// are those of the function builtin.
var update = flag.Bool("update", false, "write what the scripts said")

// asProgram makes the test binary behave as the program, for the scripts.
const asProgram = "HOLDFAST_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(scripts) == 0 {
		t.Fatal("no scripts", err)
	}
	for _, path := range scripts {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			t.Parallel()
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			s := newScript(t)
			got := s.run(string(want))
			if got == string(want) {
				return
			}
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			t.Errorf("%s: what was said differs (go test -update writes it):\n%s", path, differ(string(want), got))
		})
	}
}

// differ shows the first lines that differ.
func differ(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		if i >= len(w) || i >= len(g) || w[i] != g[i] {
			return fmt.Sprintf("line %d\nwant: %s\ngot:  %s", i+1,
				strings.Join(w[min(i, len(w)):min(i+6, len(w))], "\n      "), strings.Join(g[min(i, len(g)):min(i+6, len(g))], "\n      "))
		}
	}
	return "the line ends"
}

type script struct {
	t   *testing.T
	dir string
	env map[string]string
	s3  *s3test.Server // nil for most
}

func newScript(t *testing.T) *script {
	dir := t.TempDir()
	// In memory where that is to be had: what is synced here need not last.
	if shm, err := os.MkdirTemp("/dev/shm", "holdfast-test-"); err == nil {
		dir = shm
		t.Cleanup(func() { os.RemoveAll(shm) })
	}
	s := &script{t: t, dir: dir, env: map[string]string{
		"HOLDFAST_REPO": filepath.Join(dir, "repo"), "HOLDFAST_STATE": filepath.Join(dir, "state"),
		"HOLDFAST_PASSPHRASE": "a passphrase",
	}}
	t.Cleanup(func() { // what a script that failed has left
		if dir, err := state.Open(s.env["HOLDFAST_STATE"]); err == nil {
			if all, err := dir.Sessions(); err == nil && len(all) == 1 {
				_ = s.killServer()
			}
		}
	})
	return s
}

// run runs a script and returns it with what was said.
func (s *script) run(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		command, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "$ ")
		switch {
		case ok:
			fmt.Fprintf(&out, "$ %s\n%s", command, s.command(command))
		case strings.HasPrefix(line, "#"), strings.TrimSpace(line) == "":
			out.WriteString(line)
		}
	}
	return out.String()
}

// command runs one line.
func (s *script) command(line string) string {
	words := split(s.t, line)
	for i := range words {
		words[i] = os.Expand(words[i], func(k string) string {
			if k == "WORK" {
				return s.dir
			}
			return s.env[k]
		})
	}
	env := s.env
	if words[0] == "with" { // with K=V... COMMAND
		env = map[string]string{}
		for k, v := range s.env {
			env[k] = v
		}
		words = words[1:]
		for strings.Contains(words[0], "=") {
			k, v, _ := strings.Cut(words[0], "=")
			env[k], words = v, words[1:]
		}
	}
	if words[0] != "holdfast" {
		if err := s.builtin(words); err != nil {
			return s.mask("! " + err.Error() + "\n")
		}
		return ""
	}
	var stdout, stderr bytes.Buffer
	cmd := s.program(env, words[1:])
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.ExitCode() < 0) {
		s.t.Errorf("%s: %v", line, err)
	}
	var said strings.Builder
	for l := range strings.Lines(stderr.String()) {
		said.WriteString("! " + l)
	}
	said.WriteString(stdout.String())
	if code := cmd.ProcessState.ExitCode(); code != 0 {
		fmt.Fprintf(&said, "[%d]\n", code)
	}
	return s.mask(said.String())
}

// program is the test binary as the program.
func (s *script) program(env map[string]string, args []string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	s.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Dir = s.dir
	cmd.Env = []string{asProgram + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "TZ=UTC"}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return cmd
}

// split cuts a line into words; double quotes hold one together.
func split(t *testing.T, line string) []string {
	var words []string
	for i, part := range strings.Split(line, `"`) {
		if i%2 == 1 {
			words = append(words, part)
		} else {
			words = append(words, strings.Fields(part)...)
		}
	}
	if len(words) == 0 {
		t.Fatalf("empty command %q", line)
	}
	return words
}

var masks = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`("seconds": )[0-9.e-]+`), "${1}0"},
	{regexp.MustCompile(`\b[0-9a-f]{2}/[0-9a-f]{64}\b`), "DIGEST"},
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "DIGEST"},
	{regexp.MustCompile(`\b[0-9a-f]{32}\b`), "ID"},
	{regexp.MustCompile(`(": )\d{8}\b`), "${1}MANY"},
	{regexp.MustCompile(`\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b`), "GUID"},
	{regexp.MustCompile(`\b[0-9a-f]{16}\b`), "SESSION"},
	{regexp.MustCompile(`\b[0-9a-f]{8}\b`), "SHORTID"},
	{regexp.MustCompile(`\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`), "TIME"},
	{regexp.MustCompile(`\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d`), "TIME"},
	{regexp.MustCompile(`\b\d+(\.\d)? s\b`), "N s"},
	{regexp.MustCompile(`(of them|should be) until \d{4}-\d\d-\d\d`), "$1 until DATE"},
	{recoveryGroups, "GROUPS"},
	{regexp.MustCompile(`go1\.\d+\S*, [a-z]+/\w+`), "GO, SYSTEM"},
	// Compressed, or with times without trailing zeros.
	{regexp.MustCompile(`("size": )\d+(,\s+"sha256")`), "${1}N$2"},
	// A new repository's configuration holds times without trailing zeros.
	{regexp.MustCompile(`parts of \d+ and \d+ bytes in a document of \d+`), "parts of N and N bytes in a document of N"},
	{regexp.MustCompile(` \(tried \d+ times\)`), ""}, // by the faults of that moment
	// Columns move with what is masked.
	{regexp.MustCompile(` {2,}(\S)`), "  $1"},
}

// recoveryGroups is a recovery key, or a line of one.
var recoveryGroups = regexp.MustCompile(`\b([0-9A-Z]{5}-){3,12}[0-9A-Z]{5}\b`)

// mask replaces what differs from run to run.
func (s *script) mask(said string) string {
	said = strings.ReplaceAll(said, s.dir, "$WORK")
	if s.s3 != nil {
		said = strings.ReplaceAll(said, s.s3.URL, "$S3")
	}
	said = strings.ReplaceAll(said, "\n\n", "\n.\n")
	for i, m := range masks {
		if i == len(masks)-1 && (strings.HasPrefix(said, "[\n") || strings.HasPrefix(said, "{\n")) {
			break // JSON is not a table
		}
		said = m.re.ReplaceAllString(said, m.to)
	}
	return said
}

// builtin is what scripts need besides the program.
//
//	mkdir DIR            with its parents
//	image FILE SIZE [AT BYTE]...   a sparse raw image, with 64 KiB of a byte at places
//	poke FILE AT BYTE    64 KiB of a byte at a place
//	write FILE TEXT      a small file of one line
//	rm PATH              with all below
//	flip GLOB            change a byte in the middle of the one file, or all
//	cut GLOB             the file's second half
//	same FILE FILE       fails if two files differ
//	ls DIR               fails with the names
//	env K=V              for what follows
//	recovery FILE        the recovery key that is printed there is $RECOVERY then
//	s3 PREFIX [locking]  start an S3 server that misbehaves, for a repository there; with Object Lock
//	vandal [PREFIX]      delete all there that a client may, and write over config
//	hidden               fails if what serves the one session shows a secret to others
//	killserver           kill what serves the one session, whose id $SESSION is then
func (s *script) builtin(words []string) error {
	path := func(i int) string {
		if filepath.IsAbs(words[i]) {
			return words[i]
		}
		return filepath.Join(s.dir, words[i])
	}
	switch words[0] {
	case "mkdir":
		return os.MkdirAll(path(1), 0o755)
	case "image":
		f, err := os.Create(path(1))
		if err != nil {
			return err
		}
		var size int64
		fmt.Sscan(words[2], &size)
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			return err
		}
		for i := 3; i+1 < len(words); i += 2 {
			if err := poke(path(1), words[i], words[i+1]); err != nil {
				return err
			}
		}
		return nil
	case "poke":
		return poke(path(1), words[2], words[3])
	case "write":
		return os.WriteFile(path(1), []byte(words[2]+"\n"), 0o600)
	case "move":
		return os.Rename(path(1), path(2))
	case "copy":
		return os.CopyFS(path(2), os.DirFS(path(1)))
	case "rm":
		return os.RemoveAll(path(1))
	case "flip":
		return s.each(path(1), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	case "cut":
		return s.each(path(1), func(b []byte) []byte { return b[:len(b)/2] })
	case "same":
		a, aerr := os.ReadFile(path(1))
		b, berr := os.ReadFile(path(2))
		if err := errors.Join(aerr, berr); err != nil {
			return err
		}
		if !bytes.Equal(a, b) {
			return errors.New("they differ")
		}
		return nil
	case "ls":
		entries, err := os.ReadDir(path(1))
		if err != nil {
			return err
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return errors.New(strings.Join(names, " "))
	case "recovery":
		b, err := os.ReadFile(path(1))
		s.env["RECOVERY"] = strings.Join(recoveryGroups.FindAllString(string(b), -1), "-")
		return err
	case "s3":
		s.s3 = s3test.New(s.t, s3test.Options{Faults: &s3test.Faults{Chance: 0.05}, Page: 5, Locking: len(words) > 2})
		s.env["HOLDFAST_REPO"] = s.s3.Repo(words[1])
		s.env["AWS_ACCESS_KEY_ID"], s.env["AWS_SECRET_ACCESS_KEY"] = s3test.AccessKey, s3test.SecretKey
		return nil
	case "vandal":
		for _, key := range s.s3.Keys() {
			s.s3.Hide(key)
			if strings.HasSuffix(key, "/config") {
				s.s3.Overwrite(key, []byte("nothing to see here"))
			}
		}
		return nil
	case "hidden":
		return s.hidden()
	case "killserver":
		return s.killServer()
	case "env":
		k, v, _ := strings.Cut(words[1], "=")
		s.env[k] = v
		return nil
	}
	s.t.Fatalf("no command %q", words[0])
	return nil
}

// server finds the process that serves the one session.
func (s *script) server() (pid int, err error) {
	dir, err := state.Open(s.env["HOLDFAST_STATE"])
	if err != nil {
		return 0, err
	}
	all, err := dir.Sessions()
	if err != nil || len(all) != 1 {
		return 0, fmt.Errorf("%d sessions, not one: %w", len(all), err)
	}
	s.env["SESSION"] = all[0].ID()
	h, ok := all[0].Serving()
	if !ok {
		return 0, errors.New("nobody serves it")
	}
	return h.PID, nil
}

// hidden looks for secrets where others may look. Elsewhere than on Linux it
// does not know where.
func (s *script) hidden() error {
	pid, err := s.server()
	if err != nil || runtime.GOOS != "linux" {
		return err
	}
	for _, file := range []string{"environ", "cmdline"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err != nil {
			return err
		}
		for _, secret := range []string{s.env["HOLDFAST_PASSPHRASE"], "AWS_SECRET_ACCESS_KEY"} {
			if bytes.Contains(b, []byte(secret)) {
				return fmt.Errorf("%s holds %s", file, secret)
			}
		}
	}
	return nil
}

// killServer kills a serving process as a crash would.
func (s *script) killServer() error {
	pid, err := s.server()
	if err != nil {
		return err
	}
	p, err := os.FindProcess(pid)
	if err == nil {
		err = p.Kill()
	}
	for deadline := time.Now().Add(10 * time.Second); err == nil; {
		if _, gone := s.server(); gone != nil {
			break
		}
		if time.Now().After(deadline) {
			return errors.New("it does not die")
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

func poke(path, at, value string) error {
	var off int64
	var b byte
	if _, err := fmt.Sscan(at, &off); err != nil {
		return err
	}
	if _, err := fmt.Sscan(value, &b); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{b}, 64<<10), off)
	return errors.Join(err, f.Close())
}

// each changes the files that a pattern names.
func (s *script) each(pattern string, change func([]byte) []byte) error {
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		s.t.Fatalf("no file %s: %v", pattern, err)
	}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err == nil {
			err = os.Remove(path) // stored objects are read-only
		}
		if err == nil {
			err = os.WriteFile(path, change(b), 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
