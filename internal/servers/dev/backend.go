package main

import (
	"context"
	"fmt"
	"net/url"
	"time"
)

// checkLimit is how long a server that is not ours may take to answer.
const checkLimit = 10 * time.Second

func (b *backend) up(ctx context.Context) error {
	began := time.Now()
	if b.from != ours {
		if err := b.answers(ctx); err != nil {
			return err
		}
		fmt.Printf("%-10s answers (%s)\n", b.name, b.source())
		return nil
	}
	if b.private.Ready(ctx) == nil {
		b.url = b.private.URL()
		fmt.Printf("%-10s already serves %s\n", b.name, address(b.url))
		return nil
	}
	if err := b.private.Start(ctx); err != nil {
		return err
	}
	b.url = b.private.URL()
	fmt.Printf("%-10s serves %s after %s\n", b.name, address(b.url), since(began))
	return nil
}

// down leaves the servers alone that are not ours; those of compose go together.
func (b *backend) down(ctx context.Context) error {
	began := time.Now()
	if err := b.private.Stop(ctx); err != nil {
		return err
	}
	fmt.Printf("%-10s stopped after %s\n", b.name, since(began))
	return nil
}

func (b *backend) status(ctx context.Context) error {
	if b.from != ours {
		if err := b.answers(ctx); err != nil {
			return err
		}
		fmt.Printf("%-10s answers (%s)\n", b.name, b.source())
		return nil
	}
	if err := b.private.Ready(ctx); err != nil {
		return err
	}
	fmt.Printf("%-10s serves %s\n", b.name, address(b.private.URL()))
	return nil
}

func (b *backend) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	if err := b.check(ctx, b.url); err != nil {
		return fmt.Errorf("%s of %s: %w", b.name, b.source(), err)
	}
	return nil
}

func (b *backend) source() string {
	if b.from == compose {
		return "deploy/compose.yaml"
	}
	return b.variable
}

// address is the part of a URL of ours that is worth a line.
func address(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "?"
	}
	return u.Host
}

func since(t time.Time) string { return fmt.Sprintf("%.1f s", time.Since(t).Seconds()) }
