package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// Address says where an export is.
type Address struct {
	Network    string // "tcp" or "unix"
	Addr       string // HOST:PORT, or the socket's path
	Export     string // name; "" is the server's default export
	TLS        bool   // TLS or nothing
	ServerName string // name that the server's certificate must carry; "": the host of Addr
}

// ParseURI reads an NBD URI (uri, whole): nbd://HOST[:PORT]/EXPORT,
// nbds:// with TLS, nbd+unix:///EXPORT?socket=PATH, nbds+unix:// with TLS.
// Of the parameters for TLS it knows tls-hostname; what would weaken TLS, and
// parameters that are not known, are errors.
func ParseURI(uri string) (Address, error) {
	a, err := parseURI(uri)
	if err != nil {
		return Address{}, fmt.Errorf("NBD URI %q: %w", uri, err)
	}
	return a, nil
}

func parseURI(uri string) (Address, error) {
	u, err := url.Parse(uri)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err // without the URI again
		}
		return Address{}, err
	}
	a := Address{Network: "tcp", Export: strings.TrimPrefix(u.Path, "/")}
	switch u.Scheme {
	case "nbd":
	case "nbds":
		a.TLS = true
	case "nbd+unix":
		a.Network = "unix"
	case "nbds+unix":
		a.Network, a.TLS = "unix", true
	default:
		return Address{}, fmt.Errorf("scheme %q is none of nbd, nbds, nbd+unix, nbds+unix", u.Scheme)
	}
	switch {
	case u.Opaque != "":
		return Address{}, errors.New("no // after the scheme")
	case u.User != nil:
		return Address{}, errors.New("user names are not supported")
	case u.Fragment != "":
		return Address{}, errors.New("a fragment (#) has no meaning")
	case !validName(a.Export):
		return Address{}, errors.New("export name is not UTF-8 of at most 4096 bytes")
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return Address{}, err
	}
	if err := a.parameters(q); err != nil {
		return Address{}, err
	}
	if a.Network == "unix" {
		if a.Addr == "" {
			return Address{}, errors.New("no socket=PATH")
		}
		if u.Host != "" {
			return Address{}, fmt.Errorf("host %q beside a Unix socket", u.Host)
		}
		return a, nil
	}
	if a.Addr != "" {
		return Address{}, errors.New("socket= needs the scheme nbd+unix or nbds+unix")
	}
	a.Addr, err = hostPort(u.Hostname(), u.Port())
	return a, err
}

// hostPort checks and joins the host, bare, and the port of a URI.
func hostPort(host, port string) (string, error) {
	if host == "" {
		return "", errors.New("no host")
	}
	if strings.Contains(host, ":") {
		if _, err := netip.ParseAddr(host); err != nil {
			return "", fmt.Errorf("host %q is no IPv6 address", host)
		}
	}
	if port == "" {
		port = DefaultPort
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", fmt.Errorf("port %q is none of 1 to 65535", port)
	}
	return net.JoinHostPort(host, port), nil
}

func (a *Address) parameters(q url.Values) error {
	for k, v := range q {
		if len(v) != 1 {
			return fmt.Errorf("parameter %s is given %d times", k, len(v))
		}
		switch {
		case k == "socket":
			a.Addr = v[0]
		case k == "tls-hostname":
			a.ServerName = v[0]
		case k == "tls-type" && v[0] == "x509", k == "tls-verify-peer" && v[0] == "1":
		case strings.HasPrefix(k, "tls-"):
			return fmt.Errorf("parameter %s=%s is not supported", k, v[0])
		default:
			return fmt.Errorf("parameter %s is not known", k)
		}
	}
	return nil
}

// String is the URI of a; ParseURI of it gives a again. A space in an export's
// name is written %20, as libnbd and QEMU read it.
func (a Address) String() string {
	u := url.URL{Scheme: "nbd", Path: "/" + a.Export}
	if a.TLS {
		u.Scheme = "nbds"
	}
	var q []string
	if a.Network == "unix" {
		u.Scheme += "+unix"
		// Slashes stay as they are: allowed in a query, and readable.
		q = append(q, "socket="+strings.ReplaceAll(escape(a.Addr), "%2F", "/"))
	} else {
		u.Host = strings.TrimSuffix(a.Addr, ":"+DefaultPort)
	}
	if a.ServerName != "" {
		q = append(q, "tls-hostname="+escape(a.ServerName))
	}
	u.RawQuery = strings.Join(q, "&")
	return u.String()
}

func escape(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }
