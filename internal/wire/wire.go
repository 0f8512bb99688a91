// Package wire holds the limits of what txbox puts on the wire. The producer
// checks them before a message is written, the database by CHECK (see
// migrations), and the relay before it publishes, since rows may come from
// elsewhere. A property test keeps the first two in agreement.
package wire

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

const (
	// MaxShortString is the limit of an AMQP 0-9-1 short string, in bytes; a
	// longer one makes the client close the whole connection.
	MaxShortString = 255
	// MaxHeaders and MaxHeaderBytes (names plus values) keep all headers within
	// the one frame, of 128 KiB by default, in which AMQP carries them.
	MaxHeaders     = 64
	MaxHeaderBytes = 32 << 10
	// MaxKey is in bytes.
	MaxKey = 1024
	// MaxPayload is the most that the database accepts, in bytes: the default
	// limit of RabbitMQ 3.
	MaxPayload = 128 << 20

	// KeyHeader and CreatedAtHeader are added to each message; HeaderPrefix is
	// kept for them.
	KeyHeader       = HeaderPrefix + "key"
	CreatedAtHeader = HeaderPrefix + "created-at"
	HeaderPrefix    = "outbox-"

	// CreatedAtFormat is RFC 3339 with microseconds, PostgreSQL's precision.
	CreatedAtFormat = "2006-01-02T15:04:05.000000Z07:00"
)

// isReserved says that RabbitMQ or txbox gives a header of that name a meaning: CC
// and BCC add routing keys, the others steer or record delivery.
// https://www.rabbitmq.com/docs/sender-selected, https://www.rabbitmq.com/docs/dlx
func isReserved(name string) bool {
	switch name {
	case "CC", "BCC", "x-death", "x-delivery-count", "x-acquired-count", "x-delay", "x-received-from", "x-shovelled":
		return true
	}
	for _, prefix := range [...]string{HeaderPrefix, "x-first-death-", "x-last-death-", "x-opt-", "x-stream-"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// CheckShortString says why s cannot be an exchange, routing key, type, content
// type or header name.
func CheckShortString(s string) error {
	if len(s) > MaxShortString {
		return fmt.Errorf("is %d bytes long, AMQP carries %d", len(s), MaxShortString)
	}
	if strings.ContainsAny(s, "\r\n") {
		return errors.New("holds a line break")
	}
	return CheckText(s)
}

// CheckText says why s cannot be PostgreSQL text.
func CheckText(s string) error {
	if strings.IndexByte(s, 0) >= 0 {
		return errors.New("holds a NUL byte")
	}
	if !utf8.ValidString(s) {
		return errors.New("is not valid UTF-8")
	}
	return nil
}

// CheckKey says why s cannot be a message's key; "" is none.
func CheckKey(s string) error {
	if len(s) > MaxKey {
		return fmt.Errorf("is %d bytes long, the limit is %d", len(s), MaxKey)
	}
	return CheckText(s)
}

// CheckHeaders says why headers cannot travel. Their values must be strings.
func CheckHeaders[V any](headers map[string]V) error {
	if len(headers) > MaxHeaders {
		return fmt.Errorf("are %d, the limit is %d", len(headers), MaxHeaders)
	}
	size := 0
	for name, v := range headers {
		value, ok := any(v).(string)
		if !ok {
			return fmt.Errorf("value of %q is no string", name)
		}
		if name == "" {
			return errors.New("have one with an empty name")
		}
		if err := CheckShortString(name); err != nil {
			return fmt.Errorf("name %.40q %w", name, err)
		}
		if isReserved(name) {
			return fmt.Errorf("name %q is reserved", name)
		}
		if err := CheckText(value); err != nil {
			return fmt.Errorf("value of %q %w", name, err)
		}
		size += len(name) + len(value)
	}
	if size > MaxHeaderBytes {
		return fmt.Errorf("hold %d bytes of names and values, the limit is %d", size, MaxHeaderBytes)
	}
	return nil
}
